"""A peer that spoils every exchange: the others name it, go on without it, and take it in again."""

import pytest
from peers import assert_one_state, assert_truthful, committed, over_both

OPTIONS = {"timeout": 10.0, "record_ttl": 10.0, "matchmaking": 2.0, "width": 5000, "peers": 4}


@pytest.mark.timeout(240)
@over_both(["kind"], [("garbage",), ("stall",)], quick=[])
def test_a_saboteur_is_named_left_out_and_let_in_again(swarm, kind):
    sign = swarm.directory / "sabotage"
    saboteur = swarm.start("saboteur", sabotage=[kind, str(sign)], **OPTIONS)
    others = [swarm.start("peer", **OPTIONS) for _ in range(3)]
    swarm.wait_for(lambda: all(peer.group_size == 4 for peer in swarm.peers), what="all in one group")
    sign.touch()
    swarm.wait_for(lambda: all(peer.group_size == 3 for peer in others), what="updates for all its sabotage")
    sign.unlink()
    swarm.wait_for(lambda: all(peer.group_size == 4 for peer in others), 120, "the saboteur is let in again")
    reformed, *results = swarm.finish(saboteur, *others)
    assert_one_state(reformed, *results)
    for result in results:
        assert result["error"] == ""
        assert_truthful(result)
        assert_left_out_for_a_while(reformed["peer_id"], result)
    assert_named(reformed["peer_id"], results)


def assert_left_out_for_a_while(saboteur, result):
    """Updates after the first sabotaged round were made without the saboteur, the first and last of all with it.

    Not each update after a failure: who has not seen the fault itself blames nobody, and may lead the next group.
    """
    first = min(at for at, report in enumerate(result["rounds"]) if report["outcome"] == "incomplete")
    updates = [{member["peer_id"] for member in report["members"]} for report in committed(result)]
    after = [report for report in result["rounds"][first:] if report["outcome"] == "averaged"]
    assert saboteur in updates[0]
    assert any(saboteur not in {member["peer_id"] for member in report["members"]} for report in after)
    assert saboteur in updates[-1]


def assert_named(saboteur, results):
    """The reports of the honest peers blame the saboteur and nobody else, and name it where they do."""
    failed = [report for result in results for report in result["rounds"] if report["outcome"] == "incomplete"]
    assert {peer_id for report in failed for peer_id in report["blamed"]} == {saboteur}, failed
    assert [report["reason"] for report in failed if report["blamed"] and saboteur[-8:] not in report["reason"]] == []
