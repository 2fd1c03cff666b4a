"""What becomes of a swarm whose peers are killed, stopped, late, slow or gone."""

import pytest
from conftest import assert_one_state, assert_truthful, wait_until

TIMEOUT_S = 12.0
WIDE = {"width": 90_000, "encode_s": 0.25, "timeout": TIMEOUT_S, "record_ttl": 6.0, "matchmaking": 2.0}


def assert_survived(*results):
    assert_one_state(*results)
    for result in results:
        assert result["error"] == ""
        assert_truthful(result)
        assert result["stall_s"] <= 1.5 * TIMEOUT_S, result["stall_s"]


@pytest.mark.parametrize("everything", [True, False], ids=["group", "main"])
@pytest.mark.parametrize("stage", ["matchmaking", "exchange"])
def test_survivors_of_a_killed_peer_go_on_together(swarm, stage, everything):
    peers = [swarm.start("peer", epochs=4, **WIDE) for _ in range(3)]
    victim, survivors = peers[0], peers[1:]
    swarm.wait_for_epoch(1)
    swarm.wait_for(lambda: victim.stage == stage, 60, f"the victim's {stage}")
    victim.processes()
    victim.kill(everything)
    wait_until(lambda: not victim.processes(), 5, "no process of the victim is left")
    assert_survived(*(peer.wait() for peer in survivors))
