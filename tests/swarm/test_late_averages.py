"""A member that sends its parts and then holds back the averages of its slice."""

import asyncio
import time

import pytest
import torch
from linked import Nodes
from members import make_group, make_offer, run_rounds

from hivetrain.averaging.direct.frames import Header, Kind
from hivetrain.averaging.report import Outcome

VICTIM = 2  # the member that misbehaves
SOME_BYTES = 1024


class Dripping:
    """In place of a link's sending pipe: sends each average in small pieces with pauses, so that it is never silent."""

    def __init__(self, pipe):
        self._pipe = pipe

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def send(self, head, data, is_closed):
        if Header.from_bytes(head).kind is not Kind.AVERAGE:
            self._pipe.send(head, data, is_closed)
            return
        self._pipe._stream.send(head, b"")
        for start in range(0, len(data), SOME_BYTES):
            if is_closed():
                raise OSError("closed")
            self._pipe._stream.send(b"", bytes(memoryview(data)[start : start + SOME_BYTES]))
            time.sleep(0.1)


def test_a_member_that_drips_its_averages_is_named_by_all():
    vectors = [torch.full((600_000,), float(member)) for member in range(3)]  # one part in each slice: sent at once

    async def run():
        async with Nodes(3, part_timeout_s=1.5) as nodes:
            first = await nodes.average(vectors)
            assert {result.verdict.outcome for result in first} == {Outcome.AVERAGED}
            victim = nodes.nodes[VICTIM]
            for node in nodes.nodes[:VICTIM]:
                link = victim.paths.links.find(node.peer_id)
                link.outgoing = Dripping(link.outgoing)
            return await nodes.average(vectors, timeout_s=9.0)

    for result in asyncio.run(run())[:VICTIM]:
        assert result.verdict.outcome is Outcome.INCOMPLETE
        assert result.verdict.culprits == (VICTIM,), result.verdict


PARTS, PAUSE_S, PART_TIMEOUT_S = 12, 0.8, 1.0


def paused(pauses_s):
    """Waits before each message of a stream."""

    def stream(messages):
        async def slowly():
            for pause_s in pauses_s:
                await asyncio.sleep(pause_s)
                yield await anext(messages)

        return slowly()

    return stream


@pytest.fixture
def short_parts(monkeypatch):
    monkeypatch.setattr("hivetrain.averaging.layout.PART_ELEMENTS", 1000)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("hidden", [False, True], ids=["all-reduce", "one-only-takes"])
def test_a_member_whose_averages_are_each_just_in_time_is_named_when_time_is_up(hidden):
    group = make_group([make_offer(bandwidth=0.0 if hidden and member == 0 else 1.0) for member in range(3)])
    numel = PARTS * 1000 * (2 if hidden else 3)
    vectors = [torch.ones(numel)] * 3
    holds_back = {(member, VICTIM): paused([PAUSE_S] * PARTS) for member in range(VICTIM)}
    verdicts = asyncio.run(run_rounds(group, vectors, answer=holds_back, vote_timeout_s=PART_TIMEOUT_S, timeout_s=4.0))
    for verdict in verdicts[:VICTIM]:
        assert verdict.outcome is Outcome.INCOMPLETE
        assert verdict.culprits == (VICTIM,), verdict


@pytest.mark.usefixtures("short_parts")
def test_a_reducer_that_waits_for_another_member_names_it_and_is_not_named():
    group = make_group([make_offer() for _ in range(3)])
    vectors = [torch.ones(PARTS * 3000)] * 3
    slow = {(VICTIM, 1): paused([PAUSE_S] * PARTS)}  # its parts for member 1 alone are just in time
    verdicts = asyncio.run(run_rounds(group, vectors, slow, vote_timeout_s=PART_TIMEOUT_S, timeout_s=4.0))
    assert {verdict.outcome for verdict in verdicts} == {Outcome.INCOMPLETE}
    assert verdicts[1].culprits == (VICTIM,), verdicts
    assert verdicts[0].culprits == (), verdicts
