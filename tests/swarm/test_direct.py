"""Rounds over direct links: what comes out, who is let in, and what stays open."""

import asyncio
import threading

import pytest
import torch
from linked import Nodes
from members import digests

from hivetrain.averaging.report import Outcome


def make_vectors(members, numel):
    generator = torch.Generator().manual_seed(members * numel)
    return [torch.randn(numel, generator=generator) for _ in range(members)]


@pytest.mark.parametrize("transport", ["auto", "direct-plain"])
@pytest.mark.parametrize("codec", ["none", "fp16", "int8"])
def test_members_end_with_the_same_bytes_of_the_weighted_mean(transport, codec):
    vectors, samples = make_vectors(3, 1_000_003), (1, 2, 5)

    async def run():
        async with Nodes(3, transport=transport) as nodes:
            return await nodes.average(vectors, nodes.group(samples), codec=codec)

    results = asyncio.run(run())
    assert [result.verdict.outcome for result in results] == [Outcome.AVERAGED] * 3, results
    assert len(digests([result.verdict.average for result in results])) == 1
    expected = sum(v.double() * n for v, n in zip(vectors, samples, strict=True)).float() / 8
    tolerance = {"none": 1e-6, "fp16": 4e-3, "int8": 8e-2}[codec]
    torch.testing.assert_close(results[0].verdict.average, expected, rtol=0, atol=tolerance)
    mode = "direct" if transport == "auto" else transport
    assert all(way == mode for result in results for way in result.ways.values())
    assert {result.verdict.fraction for result in results} == {1.0}
    assert sum(r.verdict.bytes_sent for r in results) == sum(r.verdict.bytes_received for r in results) > 0


def test_links_are_kept_between_rounds_and_closed_in_the_end():
    vectors = make_vectors(3, 300_000)

    async def run():
        async with Nodes(3) as nodes:
            seen = []
            for _ in range(3):
                results = await nodes.average(vectors)
                assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
                links = [link for node in nodes.nodes for link in node.paths.links._links.values()]
                seen.append(set(map(id, links)))
                assert len(links) == 6
            assert seen[0] == seen[1] == seen[2]
        assert all(link.is_released for link in links)

    before = set(threading.enumerate())
    asyncio.run(run())
    left = [t.name for t in set(threading.enumerate()) - before if "link" in t.name]
    assert not left
