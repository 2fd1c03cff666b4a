"""A validator may die at any moment: what it sets afterwards is what it would have set anyway."""

import json
import os
import random
import signal
import time
import warnings

import pytest
import torch
from small_economy import TEMPO, Miner, Station, epoch_of

from hivetrain.contribution.audit import Verdict
from hivetrain.validator.schema import Database

END = 2 * TEMPO - 2
FORK_S = 15.0


def louder(loss, sketch, flat):
    return loss, sketch * 1.2, flat


def dying_round(station, writes):
    """One round in a process that kills itself before its n-th write; True if it came to an end before that."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's other threads are not there after a fork
            _count_writes(writes, lambda: os.kill(os.getpid(), signal.SIGKILL))
            station.restart()
            station.round()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + FORK_S
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:  # a lock that another thread held at the fork: killed there, as anywhere else
            warnings.warn(f"a forked round hung for {FORK_S:g} s", stacklevel=2)
            os.kill(child, signal.SIGKILL)
            deadline += FORK_S
        time.sleep(0.002)
    status = status[1]
    assert status in (0, signal.SIGKILL), "the round failed"
    return status == 0


def _count_writes(writes, at_last):
    plain = Database.write
    left = [writes]

    def counted(self, statement, *values):
        left[0] -= 1
        if left[0] == 0:
            at_last()
        return plain(self, statement, *values)

    Database.write = counted


def test_a_validator_killed_in_every_round_sets_the_same_weights(world, station):
    mortal = Station(world, "mortal")
    world.advance_to(2 * TEMPO)
    miners = [Miner(world, "one"), Miner(world, "two"), Miner(world, "liar", lie=louder)]
    rolls, killed = random.Random(0), 0

    def look():
        nonlocal killed
        station.round()
        for _ in range(20):
            if dying_round(mortal, rolls.choice((1, 2, 3, 5, 8, 13, 21, 34, 10**6))):
                return
            killed += 1
        pytest.fail("no round comes to an end")

    mortal.close()
    for number in range(2 * TEMPO - 1):
        for miner in miners:
            miner.contribute(1 + (number + miner.slot) % 2)
        look()
        world.finish_epoch(*miners)
        world.advance()
        look()
    mortal.restart()
    assert killed > 20
    assert len(mortal.tempos()) == 2
    assert mortal.tempos() == [row for row in station.tempos() if row[0] > 2 * TEMPO]
    assert mortal.on_chain() == station.on_chain() != {}
    assert miners[2].address not in mortal.on_chain()
    for miner in miners:
        assert mortal.verdicts(miner) == station.verdicts(miner)
    mortal.close()


@pytest.mark.parametrize("away", [1, 3, 5])
def test_a_validator_that_is_away_for_some_blocks_sets_the_same_weights(world, station, away):
    other = Station(world, "other")
    world.advance_to(2 * TEMPO)
    miners = [Miner(world, "one"), Miner(world, "two")]
    while world.block <= 2 * TEMPO + TEMPO - 2:
        for miner in miners:
            miner.contribute(1 + miner.slot % 2)
        gone = 2 * TEMPO + 3 <= world.block < 2 * TEMPO + 3 + away
        for each in (station,) if gone else (station, other):
            each.round()
        world.finish_epoch(*miners)
        world.advance()
        if world.block == 2 * TEMPO + 3 + away:
            other.restart()
    for each in (station, other):
        each.round()
    assert other.tempos()[-1] == station.tempos()[-1]
    assert other.on_chain() == station.on_chain() != {}
    other.close()


def test_a_tempo_is_closed_late_with_what_was_due_in_it(world, station):
    miner, rest = Miner(world, "miner"), Miner(world, "rest")
    while world.block < END - 1:
        epoch_of(world, miner, rest, stations=[station])
    world.advance_to(END + 3)
    station.restart()
    station.round()
    assert [row[0] for row in station.tempos()] == [END]
    due = station.state.database.rows("SELECT due, tempo FROM records WHERE verdict IS NOT NULL")
    assert {tempo for block, tempo in due if block <= END} == {END}
    assert {tempo for block, tempo in due if block > END} == {None}
    query = "SELECT sum(samples) FROM records WHERE tempo = ? AND verdict IN (?, ?)"
    (samples,) = station.state.database.one(query, END, Verdict.PASSED, Verdict.NOT_DRAWN)
    assert sum(score["samples"] for score in json.loads(station.tempos()[0][1]).values()) == samples > 0


def test_a_tempo_without_a_poll_is_not_scored_and_nothing_is_lost(world, station):
    miner = Miner(world, "miner")
    while world.block <= END:
        epoch_of(world, miner, stations=[station])
    before = station.on_chain()
    world.advance_to(4 * TEMPO + 3)
    station.restart()
    for _ in range(4):
        station.round()
        world.advance()
    assert [row[0] for row in station.tempos()] == [END, END + TEMPO]  # in the second the first rounds were still read
    assert station.on_chain() == before
    while world.block <= END + 3 * TEMPO:
        epoch_of(world, miner, stations=[station])
    assert [row[0] for row in station.tempos()] == [END, END + TEMPO, END + 3 * TEMPO]


def test_averages_outlive_the_process_and_decay(world, station):
    miner, gone = Miner(world, "miner"), Miner(world, "gone")
    while world.block <= END:
        epoch_of(world, miner, gone, stations=[station])
    assert station.on_chain() == pytest.approx({miner.address: 0.5, gone.address: 0.5}, abs=1e-4)
    station.restart()
    while world.block <= END + 2 * TEMPO:
        epoch_of(world, miner, stations=[station])
    weights = station.on_chain()
    assert 0 < weights[gone.address] < 0.3 < weights[miner.address]


def test_old_tempos_are_forgotten_and_positions_are_not(world, tmp_path):
    from hivetrain.validator.config import ScoringOptions

    short = Station(world, "short", ScoringOptions(submit_margin=2, keep_tempos=1))
    world.advance_to(TEMPO)
    early, steady = Miner(world, "early"), Miner(world, "steady")
    epoch_of(world, early, steady, stations=[short])
    while world.block <= END + 3 * TEMPO:
        epoch_of(world, steady, stations=[short])
    count = {name: len(short.state.database.rows(f"SELECT * FROM {name}")) for name in ("records", "rounds", "polls")}
    assert all(rows < 5 * TEMPO for rows in count.values())
    assert len(short.tempos()) <= 2
    assert short.verdicts(early) == {}
    early.offset = 0
    epoch_of(world, early, steady, stations=[short])
    assert list(short.verdicts(early).values()) == [Verdict.INVALID]  # its data were sold before
    short.close()
