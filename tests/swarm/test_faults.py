"""What becomes of a swarm whose peers are killed, stopped, late, slow or gone."""

import itertools
import signal
import time

import pytest
from peers import Swarm, assert_one_state, assert_truthful, committed, over_both, wait_until

from hivetrain.swarm import start_dht, visible_maddrs

TIMEOUT_S = 12.0
SMALL = {"timeout": TIMEOUT_S, "record_ttl": 10.0, "matchmaking": 2.0}
WIDE = {**SMALL, "width": 90_000, "encode_s": 0.2}  # an exchange of a second, in several parts
STAGES = ["matchmaking", "exchange"]
PROCESSES = ["group", "main"]  # which of a peer's processes are hit: all, or only the one that trains


def assert_survived(*results):
    assert_one_state(*results)
    for result in results:
        assert result["error"] == ""
        assert_truthful(result)
        assert result["stall_s"] <= 1.5 * TIMEOUT_S


@over_both(["stage", "processes"], itertools.product(STAGES, PROCESSES), quick=[("exchange", "group")])
def test_survivors_of_a_killed_peer_go_on_together(swarm, stage, processes):
    victim, *survivors = swarm.start_together(3, **WIDE)
    swarm.wait_for_epoch(1)
    swarm.wait_for(lambda: victim.stage == stage, 60, f"the victim's {stage}")
    victim.processes()
    victim.kill(everything=processes == "group")
    wait_until(lambda: not victim.processes(), 5, "no process of the victim is left")
    results = swarm.finish(*survivors)
    assert_survived(*results)
    assert committed(results[0])[-1]["group_size"] == 2


@over_both(["processes"], [("group",), ("main",)], quick=[("group",)])
def test_a_stopped_peer_is_left_behind_and_catches_up(secluded_swarm, processes):
    swarm = secluded_swarm
    victim, *others = swarm.start_together(3, **WIDE)
    swarm.wait_for_epoch(1)
    swarm.wait_for(lambda: victim.stage == "exchange", 60, "the victim's exchange")
    victim.send(signal.SIGSTOP, everything=processes == "group")
    swarm.wait_for_epoch(victim.epoch + 3, *others)
    victim.send(signal.SIGCONT, everything=processes == "group")
    stopped, *results = swarm.finish(victim, *others, epochs=3)
    assert_survived(*results)
    assert_one_state(stopped, results[0])
    assert_truthful(stopped)
    assert stopped["error"] == ""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("processes", PROCESSES)
def test_a_peer_stopped_for_thirty_seconds_comes_back(secluded_swarm, processes):
    swarm = secluded_swarm
    options = {"timeout": 60.0, "record_ttl": 30.0, "matchmaking": 5.0}  # the strategy's defaults
    victim, *others = swarm.start_together(3, **(WIDE | options))
    swarm.wait_for_epoch(1)
    swarm.wait_for(lambda: victim.stage == "exchange", 60, "the victim's exchange")
    victim.send(signal.SIGSTOP, everything=processes == "group")
    resume = time.monotonic() + 30
    swarm.wait_for(lambda: time.monotonic() > resume, 60, "30 s")
    victim.send(signal.SIGCONT, everything=processes == "group")
    stopped, *results = swarm.finish(victim, *others, epochs=3)
    assert_one_state(stopped, *results)
    for result in (stopped, *results):
        assert result["error"] == ""
        assert_truthful(result)
    assert max(result["stall_s"] for result in results) <= 1.5 * options["timeout"]


@over_both([], [()])
def test_a_late_peer_gets_params_and_optimizer_state(swarm):
    swarm.start_together(2, **SMALL)
    swarm.wait_for_epoch(2)
    late = swarm.start("late", seed=7, **SMALL)
    swarm.wait_for_epoch(2, late)
    results = swarm.finish(*swarm.peers)
    assert_survived(*results)
    assert late.wait()["samples"] > 0
    assert {report["outcome"] for report in committed(late.wait())} == {"averaged"}


def test_the_last_peer_trains_on_alone_and_says_so(swarm):
    last, *leaving = swarm.start_together(3, **SMALL)
    swarm.wait_for_epoch(1)
    leaving[0].send(signal.SIGTERM)
    leaving[1].kill()
    leaving[0].wait()
    gone = last.epoch
    swarm.wait_for_epoch(gone + 3, last)
    (result,) = swarm.finish(last)
    assert_survived(result)
    assert committed(result)[-1]["outcome"] == "alone"
    assert committed(result)[-1]["group_size"] == committed(result)[-1]["expected_peers"] == 1


def test_a_swarm_outlives_its_bootstrap_node(tmp_path, transport):
    dht = start_dht([])
    swarm = Swarm(tmp_path, 10 * "bootstrap_dies_", ",".join(visible_maddrs(dht)), transport)
    try:
        peers = swarm.start_together(3, **SMALL)
        swarm.wait_for_epoch(1)
        dht.shutdown()
        results = swarm.finish(*peers, epochs=3)
    finally:
        dht.shutdown()
        swarm.close()
    assert_survived(*results)
    assert committed(results[0])[-1]["outcome"] == "averaged"


def test_a_slow_peer_slows_rounds_but_breaks_none(swarm):
    speeds = (0.8, 0.05, 0.05)  # seconds for each part sent; a sixth of the timeout is the longest silence allowed
    peers = [swarm.start("peer", peers=3, **(WIDE | {"encode_s": seconds, "timeout": 36.0})) for seconds in speeds]
    swarm.wait_for_epoch(0)
    results = swarm.finish(*peers)
    assert_survived(*results)
    for report in results[1]["rounds"]:
        assert report["outcome"] == "averaged"
        assert report["exchange_s"] > 0.8


@over_both(["stage"], [("training",), ("matchmaking",), ("exchange",)], quick=[("exchange",)])
def test_sigterm_ends_a_peer_within_ten_seconds(swarm, stage):
    asked = swarm.start("asked", peers=2, fresh=stage == "training", **WIDE)
    other = swarm.start("other", peers=2, **WIDE)
    swarm.wait_for_epoch(1)
    swarm.wait_for(lambda: asked.stage == stage, 60, stage)
    asked.processes()
    start = time.monotonic()
    asked.send(signal.SIGTERM)
    wait_until(lambda: not asked.processes(), 30, "the end of the peer", [asked])
    assert time.monotonic() - start <= 10
    assert_truthful(asked.wait())
    (result,) = swarm.finish(other)
    assert_survived(result)
