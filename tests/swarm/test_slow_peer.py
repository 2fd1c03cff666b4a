"""A peer on a slow line, in rounds of real peers: named when the round fails, and then left out of the next."""

import pytest
import torch
from neighbours import average, neighbours

from hivetrain.averaging.report import Outcome

MEGABYTE_PER_S = 8.0  # in Mbit/s
SLOW = 2


@pytest.mark.parametrize("transport", ["direct", "libp2p"])
def test_a_round_with_a_peer_at_a_megabyte_per_second_fails_and_the_next_goes_on_without_it(bootstrap, transport):
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(6_000_000, generator=generator) for _ in range(3)]  # half a minute at its speed
    uploads = [None, None, MEGABYTE_PER_S]
    with neighbours(f"slow-{transport}", bootstrap.split(","), transport, uploads, averaging_timeout_s=9.0) as peers:
        first = average(peers, [vector[:1000] for vector in vectors])
        failed = average(peers, vectors, epoch=1)
        after = average(peers, vectors, epoch=1)
        slow = peers[SLOW].peer_id
    assert {report.outcome for report, _ in first} == {Outcome.AVERAGED}, first
    for report, result in failed:
        assert report.outcome is Outcome.INCOMPLETE, report
        assert report.group_size == 3
        assert result is None
    for report, _ in failed[:SLOW]:
        assert report.blamed == (slow,), report
        assert slow[-8:] in report.reason, report
    for report, _ in after[:SLOW]:
        assert report.outcome is Outcome.AVERAGED, report
        assert report.group_size == 2
        assert slow not in {member.peer_id for member in report.members}
    assert torch.equal(after[0][1], after[1][1])
    assert after[SLOW][0].outcome is not Outcome.AVERAGED
