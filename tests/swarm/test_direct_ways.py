"""Which way a pair takes, and that both take the same."""

import asyncio
import os
import socket
import time
from dataclasses import replace

import pytest
import torch
from linked import Nodes
from members import digests, make_group_of, make_offer

from hivetrain.averaging.direct.frames import Header, Kind
from hivetrain.averaging.direct.links import DirectLinks
from hivetrain.averaging.report import Outcome

DIRECT, LIBP2P = [{1: "direct"}, {0: "direct"}], [{1: "libp2p"}, {0: "libp2p"}]


def make_vectors(members, numel):
    generator = torch.Generator().manual_seed(members * numel)
    return [torch.randn(numel, generator=generator) for _ in range(members)]


def test_a_pair_without_a_direct_way_uses_libp2p_beside_direct_links():
    vectors = make_vectors(3, 300_000)

    async def run():
        async with Nodes(3) as nodes:
            group = nodes.group()
            hidden = nodes.nodes[2]
            offers = dict(zip(group.peer_ids, group.offers, strict=True))
            offers[hidden.peer_id] = make_offer()  # without a contact
            group = make_group_of(offers)
            return await nodes.average(vectors, group)

    results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
    assert results[0].ways == {1: "direct", 2: "libp2p"}
    assert results[2].ways == {0: "libp2p", 1: "libp2p"}
    assert len(digests([result.verdict.average for result in results])) == 1


def test_an_address_that_does_not_answer_costs_two_seconds_once():
    vectors = make_vectors(2, 1000)

    async def run():
        async with Nodes(2) as nodes:
            for node in nodes.nodes:  # a port where a connection hangs: a full backlog nobody accepts from
                node.paths.contact = replace(node.paths.contact, port=port)
            taken = []
            for _ in range(2):
                start = time.monotonic()
                results = await nodes.average(vectors)
                taken.append(time.monotonic() - start)
                assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
                assert results[0].ways == {1: "libp2p"}
                assert results[1].ways == {0: "libp2p"}
            return taken

    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        port = silent.getsockname()[1]
        first, second = asyncio.run(run())
    assert first < 4
    assert second < 1.0


def test_a_link_that_only_the_other_end_can_open_is_used():
    vectors = make_vectors(2, 1000)

    async def run():
        async with Nodes(2) as nodes:
            second = nodes.nodes[1]
            second.paths.contact = replace(second.paths.contact, port=1)  # the first decides, and cannot dial it
            return await nodes.average(vectors)

    results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
    assert [result.ways for result in results] == [{1: "direct"}, {0: "direct"}]


def test_a_peer_that_requires_direct_links_fails_the_round_without_one():
    vectors = make_vectors(2, 1000)

    async def run():
        async with Nodes(2, transport="direct") as nodes:
            offers = [node.offer() for node in nodes.nodes]
            group = make_group_of({nodes.nodes[0].peer_id: offers[0], nodes.nodes[1].peer_id: make_offer()})
            return await nodes.nodes[0].average(group, vectors[0])

    result = asyncio.run(run())
    assert result.verdict.outcome is Outcome.INCOMPLETE
    assert "cannot be reached directly" in result.verdict.reason


def test_a_peer_that_requires_direct_links_dials_again_in_the_next_round(monkeypatch):
    vectors = make_vectors(2, 1000)

    async def run():
        async with Nodes(2, transport="direct", part_timeout_s=1.0) as nodes:
            for node in nodes.nodes:
                monkeypatch.setattr(node.paths.links, "dial", nobody_answers)
            first = await nodes.average(vectors)
            monkeypatch.undo()
            return first, await nodes.average(vectors)

    async def nobody_answers(*_):
        return None

    first, second = asyncio.run(run())
    assert {result.verdict.outcome for result in first} == {Outcome.INCOMPLETE}
    assert {result.verdict.outcome for result in second} == {Outcome.AVERAGED}


# Both the same


def slow_to_dial(monkeypatch, nodes, delays_s):
    """Connections of each node take so long to open."""
    dial, delays = DirectLinks._dial_once, {node.paths.links: s for node, s in zip(nodes.nodes, delays_s, strict=True)}

    def dial_later(links, *args):
        time.sleep(delays[links])
        return dial(links, *args)

    monkeypatch.setattr(DirectLinks, "_dial_once", dial_later)


async def average_later(nodes, delays_s, group=None):
    """A round that each node enters at its own time."""
    group = group or nodes.group()

    async def enter(node, vector, delay_s):
        await asyncio.sleep(delay_s)
        return await node.average(group, vector)

    return await asyncio.gather(*map(enter, nodes.nodes, make_vectors(2, 300_000), delays_s))


def assert_averaged(results, ways):
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}, results
    assert [result.ways for result in results] == ways


@pytest.mark.parametrize("dials_s", [(0.3, 0.3), (0.7, 0.7), (0.8, 0.2), (1.2, 0.7), (1.6, 1.0)])
def test_links_that_both_ends_open_at_once_do_no_harm(dials_s, monkeypatch):
    async def run():
        async with Nodes(2) as nodes:
            slow_to_dial(monkeypatch, nodes, dials_s)
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            peer_ids = nodes.group().peer_ids
            links = [nodes.nodes[at].paths.links.find(peer_ids[1 - at]) for at in range(2)]
            for _ in range(3):
                assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            kept = [links for node in nodes.nodes for links in node.paths.links._links.values()]
            assert kept == [[link] for link in links]

    asyncio.run(run())


@pytest.mark.parametrize("late_s", [(0.6, 0), (0, 0.6)])
def test_links_that_are_opened_at_different_times_do_no_harm(late_s, monkeypatch):
    async def run():
        async with Nodes(2) as nodes:
            slow_to_dial(monkeypatch, nodes, (0.9, 0.9))
            assert_averaged(await average_later(nodes, late_s), DIRECT)
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)

    asyncio.run(run())


def test_a_link_that_comes_too_late_is_used_by_neither(monkeypatch):
    async def run():
        async with Nodes(2) as nodes:
            slow_to_dial(monkeypatch, nodes, (1.8, 9.0))
            assert_averaged(await average_later(nodes, (1.2, 0)), LIBP2P)
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)

    asyncio.run(run())


def test_who_cannot_be_called_hears_over_its_link_that_it_comes_too_late(monkeypatch):
    async def run():
        async with Nodes(2) as nodes:
            first, second = nodes.nodes
            slow_to_dial(monkeypatch, nodes, (9.0, 1.8))
            second.paths.contact = replace(second.paths.contact, port=0)
            offers = {first.peer_id: first.offer(), second.peer_id: replace(second.offer(), bandwidth=0.0)}
            results = await average_later(nodes, (0, 1.2), make_group_of(offers))
            assert_averaged(results, LIBP2P)
            assert first.service.declined == 0
            assert results[1].verdict.seconds < 3
            assert_averaged(await average_later(nodes, (0, 0), make_group_of(offers)), DIRECT)

    asyncio.run(run())


@pytest.mark.parametrize("does", ["loses", "closes"])
def test_a_kept_link_that_turns_out_to_be_dead_is_used_by_neither(does, monkeypatch):
    monkeypatch.setattr("hivetrain.averaging.direct.agreement.DIAL_S", 0.5)

    async def run():
        async with Nodes(2) as nodes:
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            paths = nodes.nodes[1].paths
            with monkeypatch.context() as patch:
                patch.setattr(paths, "_handle", lambda link, *_: link.close() if does == "closes" else None)
                assert_averaged(await average_later(nodes, (0, 0)), LIBP2P)
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)

    asyncio.run(run())


def test_a_round_that_only_one_end_was_in_leaves_the_link_as_it_was():
    async def run():
        async with Nodes(2, part_timeout_s=1.0) as nodes:
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            first, second = nodes.nodes
            link = first.paths.links.find(second.peer_id)
            alone = await first.average(nodes.group(), torch.ones(300_000))
            assert (alone.verdict.outcome, alone.verdict.culprits) == (Outcome.INCOMPLETE, (1,))
            for _ in range(2):
                assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            assert first.paths.links.find(second.peer_id) is link

    asyncio.run(run())


def test_parts_of_an_unknown_round_are_thrown_away():
    async def run():
        async with Nodes(2) as nodes:
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            first, second = nodes.nodes
            link = first.paths.links.find(second.peer_id)
            for kind in (Kind.PART, Kind.AVERAGE) * 3:
                link.outgoing.send(Header(kind, os.urandom(32), 100_000).to_bytes(), bytes(100_000), lambda: False)
            assert_averaged(await average_later(nodes, (0, 0)), DIRECT)
            assert first.paths.links.find(second.peer_id) is link

    asyncio.run(run())


def test_a_member_without_a_way_tells_its_ballot_all_the_same():
    def fails(*_):
        raise LookupError("out of place")

    async def never_answers(*_):
        await asyncio.Event().wait()

    async def run():
        async with Nodes(2) as nodes:
            first, second = nodes.nodes
            first.paths.links.find, second.paths.links.dial = fails, never_answers
            return await average_later(nodes, (0, 0))

    results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.INCOMPLETE}
    assert "has given up" in results[1].verdict.reason
    assert results[1].verdict.seconds < 1
