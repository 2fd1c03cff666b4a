"""What a member sends takes one way: by using two it must not make the others fail each other."""

import asyncio
import contextlib
import logging

import pytest
import torch
from linked import Nodes

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.direct.session import Session
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.reduction import ExchangeError, Reduction
from hivetrain.averaging.report import Outcome
from hivetrain.averaging.rules import RULES

VICTIM = 2  # the member that misbehaves towards member 0


def make_reduction(members, parts, codec):
    numel = parts * 1000
    layout = Layout.split(numel, [numel] + [0] * (members - 1), [1000] * members)
    encoding = make_codec(codec)
    return Reduction(0, [1.0] * members, layout, torch.ones(numel), encoding, RULES["mean"], torch.empty(numel))


def test_a_member_that_also_streams_while_it_has_a_link_is_refused(monkeypatch, caplog):
    vectors = [torch.full((3_000_000,), float(member)) for member in range(3)]
    refused = []

    async def run():
        async with Nodes(3) as nodes:
            group, victim = nodes.group(), nodes.nodes[VICTIM]
            next_frame, loop, tasks = Session.next_frame, asyncio.get_running_loop(), []

            async def stream(reduction):
                async def parts():
                    for index in range(len(reduction.ranges[0])):
                        while not reduction.may_send(0, index):
                            await asyncio.sleep(0.002)
                        yield bytes(reduction.outgoing(0, index))

                try:
                    async for _ in victim.service.open_stream(group.name + b"\0", group.peer_ids[0], parts()):
                        pass
                except ExchangeError as error:
                    refused.append(str(error))

            def takes_averages_only(session):
                is_victim = session.reduction.me == VICTIM and session.member == 0
                if is_victim and session._parts_sent < session._their_parts:
                    session._parts_sent = session._their_parts
                    loop.call_soon_threadsafe(lambda: tasks.append(asyncio.create_task(stream(session.reduction))))
                return next_frame(session)

            monkeypatch.setattr(Session, "next_frame", takes_averages_only)
            with caplog.at_level(logging.ERROR):
                results = await nodes.average(vectors, group, codec="fp16")
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            return results

    results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.INCOMPLETE}
    assert results[0].verdict.culprits == (VICTIM,), results[0].verdict
    assert 0 not in results[1].verdict.culprits
    assert not caplog.records
    assert all("two ways" in error for error in refused)


def test_a_link_is_refused_to_a_member_that_streams():
    reduction = make_reduction(2, 1, "none")
    assert reduction.claim(1, "stream")
    with pytest.raises(ExchangeError, match="two ways") as caught:
        Session(b"g" * 32, 0, 1, reduction, lambda: None)
    assert caught.value.culprits == (1,)


def test_an_average_is_kept_until_every_member_has_it_however_often_one_takes_it():
    reduction = make_reduction(3, 1, "fp16")
    for member in (1, 2):
        reduction.add(member, 0, bytes(2000))
    expected = bytes(reduction.average(1, 0))
    for _ in range(2):
        reduction.taken(1, 0)
    assert bytes(reduction.average(2, 0)) == expected
    reduction.taken(2, 0)
    assert reduction._parts[0].average is None


def test_a_member_that_takes_no_averages_cannot_have_more_of_them_kept_than_its_window():
    reduction = make_reduction(2, 191, "fp16")
    for index in range(reduction.window):
        reduction.add(1, index, bytes(2000))
    with pytest.raises(ExchangeError, match="ahead of its window") as caught:
        reduction.add(1, reduction.window, bytes(2000))
    assert caught.value.culprits == (1,)
    reduction.average(1, 0)  # is under way
    reduction.add(1, reduction.window, bytes(2000))


def test_an_error_of_this_program_on_a_link_blames_nobody_at_the_other_end(monkeypatch, caplog):
    def breaks(self, member, index):
        if self.me == VICTIM:
            raise ZeroDivisionError("a mistake")
        return outgoing(self, member, index)

    outgoing = Reduction.outgoing
    monkeypatch.setattr(Reduction, "outgoing", breaks)

    async def run():
        async with Nodes(3) as nodes:
            return await nodes.average([torch.ones(300_000)] * 3)

    verdicts = [result.verdict for result in asyncio.run(run())]
    assert {verdict.outcome for verdict in verdicts} == {Outcome.INCOMPLETE}
    assert verdicts[VICTIM].culprits == (), verdicts
    assert "log" in verdicts[VICTIM].reason
    assert all(set(verdict.culprits) <= {VICTIM} for verdict in verdicts), verdicts
    assert "ZeroDivisionError: a mistake" in caplog.text
