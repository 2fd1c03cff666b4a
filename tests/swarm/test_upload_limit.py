"""``max_upload_mbit_s`` is what a peer sends, no more and no less, whichever way and to however many."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch
from linked import Nodes
from neighbours import average, neighbours

from hivetrain.averaging.report import Outcome

LIMIT_MBIT_S = 40.0
ROUNDS = 4  # a machine that is busy with something else may need a second one, to be as fast as the limit
BYTES_PER_PEER = 18e6  # three and a half seconds at that limit


@pytest.mark.parametrize(("transport", "count"), [("direct", 2), ("direct", 3), ("libp2p", 2), ("libp2p", 3)])
def test_an_upload_limit_is_used_and_kept_within_five_percent_over_all_links(bootstrap, transport, count):
    numel = int(BYTES_PER_PEER / 4 / (2 * (count - 1) / count))
    generator = torch.Generator().manual_seed(count)
    vectors = [torch.randn(numel, generator=generator) for _ in range(count)]
    run_id = f"upload-{transport}-{count}"
    rates = []
    with neighbours(run_id, bootstrap.split(","), transport, [LIMIT_MBIT_S] * count) as peers:
        average(peers, [vector[:1000] for vector in vectors])  # opens the links
        for epoch in range(1, 1 + ROUNDS):
            reports = [report for report, _ in average(peers, vectors, epoch)]
            assert {report.outcome for report in reports} == {Outcome.AVERAGED}, reports
            assert {way for report in reports for way in report.links.values()} == {transport}
            assert {report.group_size for report in reports} == {count}
            rates.append([report.bytes_sent * 8 / 1e6 / report.exchange_s for report in reports])
            assert max(rates[-1]) <= 1.05 * LIMIT_MBIT_S, rates
            if min(rates[-1]) >= 0.95 * LIMIT_MBIT_S:
                return
    pytest.fail(f"{LIMIT_MBIT_S} Mbit/s were not reached: {rates}")


def rate_of(bytes_per_s):
    return round(4 * math.log2(bytes_per_s))


def test_a_limited_peer_tells_its_limit_as_its_rate_before_it_has_measured_any():
    async def told():
        async with Nodes(1, upload_mbit_s=LIMIT_MBIT_S) as nodes:
            return nodes.nodes[0].offer().contact.rate

    assert asyncio.run(told()) == rate_of(LIMIT_MBIT_S * 1e6 / 8)


def test_links_that_share_a_line_and_end_one_after_the_other_measure_the_line():
    line = 10e6  # both send at half of it for two seconds, then one has it for itself for two more
    counts = [(int(line), 2.0), (int(3 * line), 4.0)]
    links = [SimpleNamespace(outgoing=SimpleNamespace(take_counts=lambda count=count: count)) for count in counts]

    async def measured():
        async with Nodes(1) as nodes:
            nodes.nodes[0].paths._measure(links)
            return nodes.nodes[0].offer().contact.rate

    assert asyncio.run(measured()) == rate_of(line)
