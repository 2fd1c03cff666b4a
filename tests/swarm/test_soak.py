"""Fifty epochs of a swarm that never stays the same."""

import random
import signal

import pytest
from peers import assert_one_state, assert_truthful, committed

EPOCHS, MIN_PEERS, MAX_PEERS = 50, 2, 4
OPTIONS = {"timeout": 15.0, "record_ttl": 20.0, "matchmaking": 2.0, "width": 30_000, "encode_s": 0.1}
OPTIONS |= {"target": 64, "microbatch_s": 0.15}  # slow enough for peers to come while epochs go by


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1])
def test_fifty_epochs_of_kills_stops_and_joins_end_with_equal_digests(secluded_swarm, seed):
    swarm = secluded_swarm
    chance = random.Random(seed)
    living = swarm.start_together(3, **OPTIONS)
    swarm.wait_for_epoch(0)
    stopped, done = [], []
    epoch = 0
    while epoch < EPOCHS:
        trained = [peer for peer in living if peer.epoch >= 0]
        leavings = ["kill", "kill_main", "leave", "stop"] * (len(trained) > MIN_PEERS)
        event = chance.choice(["join"] * (len(living) < MAX_PEERS) + leavings or ["none"])
        done.append((epoch, event))
        if event == "join":
            living.append(swarm.start("late", fresh=True, seed=chance.randrange(10**6), **OPTIONS))
        elif event != "none":
            victim = chance.choice(trained)
            living.remove(victim)
            victim.processes()
            if event == "leave":
                victim.send(signal.SIGTERM)
            elif event == "stop":
                victim.send(signal.SIGSTOP, everything=chance.random() < 0.5)
                stopped.append(victim)
            else:
                victim.kill(everything=event == "kill")
        reached = max(peer.epoch for peer in living)
        assert reached >= epoch - 1, f"what the swarm had learned is lost; {done}"
        epoch = reached + chance.randint(2, 4)
        swarm.wait_for(lambda last=epoch: max(peer.epoch for peer in living) >= last, 180, f"epoch {epoch}; {done}")
        while stopped:
            back = stopped.pop()
            back.send(signal.SIGCONT, everything=True)
            living.append(back)
    swarm.wait_for(lambda: min(peer.epoch for peer in living) >= epoch, 180, f"all at epoch {epoch}; {done}")
    results = swarm.finish(*living, epochs=3)
    assert_one_state(*results)
    assert results[0]["epoch"] >= EPOCHS
    for result in results:
        assert result["error"] == ""
        assert_truthful(result)
    assert {report["outcome"] for report in committed(results[0])} <= {"averaged", "alone"}
