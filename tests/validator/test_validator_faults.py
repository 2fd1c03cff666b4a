"""Chain, swarm and state in trouble: what a validator does then, and that it says so."""

import itertools
import logging

import pytest
from small_economy import AUDITS, TEMPO, FollowedWorld, Miner, Station, T, World, epoch_of, soon

from hivetrain.chain.base import Code, LedgerError, Outcome, Receipt
from hivetrain.chain.local import LocalChain
from hivetrain.contribution.audit import Verdict
from hivetrain.errors import UserError
from hivetrain.keys import Hotkey
from hivetrain.validator.config import ChainOptions, ReplayOptions, RunOptions, ScoringOptions
from hivetrain.validator.schema import Database
from hivetrain.validator.state import State
from hivetrain.validator.submission import Submission
from hivetrain.validator.watch import ValidatorWatcher

END = 2 * TEMPO - 2


class FaultyChain(LocalChain):
    """A ledger whose calls fail as told: code -> raised; "lost": it happens and the answer is lost; "gone": neither."""

    def __init__(self, *args):
        super().__init__(*args)
        self.faults, self.sent = {}, 0

    def snapshot(self, timeout_s):
        self._fail("snapshot")
        return super().snapshot(timeout_s)

    def submit_weights(self, weights, version_key, timeout_s):
        self.sent += 1
        fault = next(self.faults["submit"], None) if "submit" in self.faults else None
        if isinstance(fault, Code):
            raise LedgerError(fault, "as told")
        if fault == "gone":
            return Receipt(Outcome.UNKNOWN)
        receipt = super().submit_weights(weights, version_key, timeout_s)
        return Receipt(Outcome.UNKNOWN) if fault == "lost" else receipt

    def _fail(self, name):
        fault = next(self.faults[name], None) if name in self.faults else None
        if fault is not None:
            raise LedgerError(fault, "as told")


class FaultyStation(Station):
    def restart(self):
        self.world.chain = lambda hotkey: FaultyChain(self.world.path, hotkey)
        super().restart()

    def status(self):
        row = self.state.database.one("SELECT status, attempts, receipt FROM tempos ORDER BY block DESC LIMIT 1")
        return tuple(row)


@pytest.fixture
def faulty(world):
    made = FaultyStation(world, "faulty")
    world.advance_to(TEMPO)
    yield made
    made.close()


def play_until(world, block, station, *miners):
    while world.block < block:
        epoch_of(world, *miners, stations=[station])


def test_weights_are_sent_once_a_tempo(world, faulty):
    miner = Miner(world, "miner")
    play_until(world, END + 2 * TEMPO, faulty, miner)
    faulty.round()
    faulty.round()
    assert faulty.chain.sent == len(faulty.tempos()) == 3
    assert faulty.status() == ("set", 1, f"applied in block {world.block}")


@pytest.mark.parametrize("restart", [False, True])
def test_a_lost_answer_is_read_back_and_not_sent_again(world, faulty, restart):
    miner = Miner(world, "miner")
    faulty.chain.faults["submit"] = iter(["lost"])
    play_until(world, END, faulty, miner)
    assert faulty.status()[0] == "sending"
    assert faulty.on_chain() == {miner.address: 1}
    sent = faulty.chain.sent
    if restart:
        faulty.restart()
        sent = 0
    world.advance()
    faulty.round()
    assert faulty.status()[0] == "set"
    assert "read back" in faulty.status()[2]
    assert faulty.chain.sent == sent


def test_weights_that_never_arrived_are_sent_again_but_not_at_once(world, faulty):
    miner = Miner(world, "miner")
    faulty.chain.faults["submit"] = iter(["gone"])
    play_until(world, END, faulty, miner)
    faulty.round()
    assert (faulty.status()[0], faulty.chain.sent) == ("sending", 1)
    for _ in range(3):
        world.advance()
        faulty.round()
    assert faulty.status()[:2] == ("set", 2)
    assert faulty.on_chain() == {miner.address: 1}


def test_weights_on_their_way_in_the_block_of_the_last_ones_are_recognised(world, faulty):
    """``last_update`` cannot tell then; the weights themselves do."""
    miner = Miner(world, "miner")
    world.operator.change_rules(soon(), rate_limit=0)
    faulty.chain.faults["submit"] = iter(["lost"])
    play_until(world, END - 1, faulty, miner)
    world.advance()
    LocalChain(world.path, faulty.hotkey).submit_weights({faulty.hotkey.address: 1.0}, 0, T)
    faulty.round()
    faulty.round()
    assert faulty.status()[0] == "set"
    assert faulty.chain.sent == 1


def test_an_unreachable_chain_is_tried_again_with_patience(world, faulty):
    miner = Miner(world, "miner")
    faulty.chain.faults["submit"] = iter([Code.UNREACHABLE, Code.UNREACHABLE])
    play_until(world, END, faulty, miner)
    assert faulty.status() == ("pending", 1, "unreachable: as told")
    faulty.round()
    assert faulty.chain.sent == 1
    tried = []
    while faulty.status()[0] == "pending":
        world.advance()
        faulty.round()
        tried.append((world.block - END, faulty.chain.sent))
    assert [block for (block, sent), (_, before) in zip(tried[1:], tried, strict=False) if sent > before] == [2, 6]
    assert faulty.on_chain() == {miner.address: 1}


def test_a_chain_that_refuses_for_good_ends_the_attempts_of_this_tempo_only(world, caplog):
    station = FaultyStation(world, "faulty", ScoringOptions(submit_margin=2, most_attempts=2))
    world.advance_to(TEMPO)
    miner = Miner(world, "miner")
    station.chain.faults["submit"] = itertools.repeat(Code.STALE_VERSION, 2)
    play_until(world, END + 8, station, miner)
    assert station.status()[0] == "failed"
    assert "given up after 2 attempts: stale_version: as told" in caplog.text
    play_until(world, END + TEMPO, station, miner)
    assert station.status()[0] == "set"
    station.close()


def test_the_rate_limit_is_waited_for(tmp_path, monkeypatch):
    world = World(tmp_path, rate_limit=9)
    station = FaultyStation(world, "faulty")
    world.advance_to(TEMPO)
    miner = Miner(world, "miner")
    play_until(world, END - 3, station, miner)
    LocalChain(world.path, station.hotkey).submit_weights({station.hotkey.address: 1.0}, 0, T)
    sent_at = world.block
    while not station.chain.sent:
        epoch_of(world, miner, stations=[station])
    assert world.block == sent_at + 9
    assert station.status()[:2] == ("set", 1)
    station.close()
    world.close()


def test_without_a_permit_the_reason_is_said_once_and_the_weights_wait_for_it(world, caplog):
    station = FaultyStation(world, "faulty")  # registered, and no epoch has passed
    miner = Miner(world, "miner")
    with caplog.at_level(logging.WARNING):
        while world.block < TEMPO:
            epoch_of(world, miner, stations=[station])
    assert station.chain.sent == 1  # the epoch granted the permit
    assert caplog.text.count("no validator permit") == 1
    assert station.on_chain() == {miner.address: 1}
    station.close()


def test_sealed_weights_count_as_sent(tmp_path):
    world = World(tmp_path, commit_reveal=True)
    station = FaultyStation(world, "faulty")
    world.advance_to(TEMPO)
    miner = Miner(world, "miner")
    play_until(world, END, station, miner)
    assert station.status()[0] == "sealed"
    world.advance(2 * TEMPO)
    assert station.on_chain() == {miner.address: 1}
    station.close()
    world.close()


def test_a_lost_answer_about_sealed_weights_is_read_off_the_block_of_the_last_ones(tmp_path):
    world = World(tmp_path, commit_reveal=True)
    station = FaultyStation(world, "faulty")
    world.advance_to(TEMPO)
    miner = Miner(world, "miner")
    station.chain.faults["submit"] = iter(["lost"])
    play_until(world, END, station, miner)
    assert station.status()[0] == "sending"
    for _ in range(5):
        world.advance()
        station.round()
    assert station.status()[:2] == ("sealed", 1)
    station.close()
    world.close()


def test_nothing_is_sent_when_nobody_earned_anything(world, faulty):
    idle = Miner(world, "idle")
    while world.block <= END:
        faulty.round()
        world.advance()
    faulty.round()
    assert faulty.status()[0] == "empty"
    assert faulty.chain.sent == 0
    assert faulty.verdicts(idle) == {}


def louder(loss, sketch, flat):
    return loss, sketch * 1.2, flat


@pytest.mark.parametrize("sealed", [False, True])
def test_who_alone_earned_something_is_paid_no_more_once_it_is_caught(tmp_path, sealed):
    world = World(tmp_path, commit_reveal=sealed, reveal_period=2)
    station = FaultyStation(world, "faulty")
    world.advance_to(TEMPO)
    miner = Miner(world, "miner")
    play_until(world, END, station, miner)
    assert station.chain.sent == 1
    miner.lie = louder
    station.chain.faults["submit"] = iter(["lost"])
    play_until(world, END + TEMPO, station, miner)
    assert Verdict.FAILED in station.verdicts(miner).values()
    while world.block < END + 3 * TEMPO:
        world.advance()
        station.round()
    assert station.on_chain() == {station.hotkey.address: 1}
    assert station.status() == ("empty", 0, "nobody has earned anything")
    assert station.chain.sent == (3 if sealed else 2)  # again until it can be read on the chain
    it = station.chain.snapshot(T).neuron(miner.address)
    assert (it.incentive, it.emission) == (0, 0)
    miner.lie = None
    play_until(world, END + 4 * TEMPO, station, miner)
    assert station.status()[0] == ("sealed" if sealed else "set")
    station.close()
    world.close()


def test_a_new_state_file_takes_back_what_an_old_one_paid(world, faulty):
    miner = Miner(world, "miner")
    world.advance()
    faulty.chain.submit_weights({miner.address: 1.0}, 0, T)
    assert faulty.on_chain() == {miner.address: 1}
    while world.block < END:
        world.advance()
        faulty.round()
    assert faulty.on_chain() == {faulty.hotkey.address: 1}
    assert faulty.status()[2] == f"applied in block {END}; they pay nobody, as nobody has earned anything"


# The swarm


def test_a_swarm_that_cannot_be_read_makes_nothing_late_or_missing_and_weights_are_set_all_the_same(world, station):
    miner, other = Miner(world, "miner"), Miner(world, "other")
    while world.block < TEMPO + 5:
        epoch_of(world, miner, other, stations=[station])
    station.run.down = True
    stopper = Stop(0)
    while world.block <= END + 2:
        for each in (miner, other):
            each.contribute()
        stopper.left = 0
        station.validator.run_forever(stopper)
        world.finish_epoch(miner, other)
        world.advance()
    assert station.validator.faults > 0
    assert len(station.tempos()) == 1
    assert set(station.on_chain()) == {miner.address, other.address}
    station.run.down = False
    for _ in range(10):
        station.round()
        world.advance()
    for each in (miner, other):
        assert set(station.verdicts(each).values()) <= {Verdict.PASSED, Verdict.NOT_DRAWN}
        assert len(station.verdicts(each)) == world.epoch  # all were found afterwards


class Lonely(FollowedWorld):
    """Whose DHT answers, but holds nothing and knows nobody."""

    def advance(self):
        followed = super().advance()
        self.num_peers, self.caught_up = 0, False
        return followed

    def collect(self, key, wanted):
        return {}


def test_a_dht_without_peers_makes_no_reveal_missing(world, station):
    miners = [Miner(world, name) for name in ("one", "two", "three")]
    epoch_of(world, *miners, stations=[station])
    plain, station.validator._poller._run = station.run, Lonely(world)
    for _ in range(12):
        world.advance()
        station.validator.run_forever(Stop(0))
    station.validator._poller._run = plain
    station.round()
    verdicts = [verdict for miner in miners for verdict in station.verdicts(miner).values()]
    assert Verdict.PASSED in verdicts
    assert set(verdicts) <= {Verdict.PASSED, Verdict.NOT_DRAWN}


def test_a_dht_without_peers_makes_no_record_late(world, station):
    miner = Miner(world, "miner")
    station.round()
    plain, station.validator._poller._run = station.run, Lonely(world)
    block = world.block
    for _ in range(4):
        station.validator.run_forever(Stop(0))
        world.advance()
    station.validator._poller._run = plain
    miner.mine()
    miner.publish(miner.record(block=block + 1))
    station.round()
    assert station.verdicts(miner) == {0: None}
    assert station.state.database.one("SELECT count(*) FROM polls")[0] == 2


# The loop


class Stop:
    """Counts rounds, remembers pauses."""

    def __init__(self, rounds):
        self.left, self.pauses = rounds, []

    def __call__(self, seconds):
        self.pauses.append(seconds)
        self.left -= 1
        return self.left < 0


def test_the_loop_survives_a_chain_that_is_away_and_waits_longer_each_time(world, faulty, caplog):
    miner = Miner(world, "miner")
    faulty.chain.faults["snapshot"] = itertools.chain([Code.UNREACHABLE] * 8, itertools.repeat(None))
    stop = Stop(9)
    faulty.validator.run_forever(stop)
    assert stop.pauses[:8] == [2, 4, 8, 8, 8, 8, 8, 8]
    assert stop.pauses[8:] == [1, 1]
    assert faulty.validator.faults == 8
    assert "round cut short (8 in a row): unreachable: as told" in caplog.text
    play_until(world, END, faulty, miner)
    assert faulty.on_chain() == {miner.address: 1}


def test_the_loop_survives_what_nobody_thought_of(world, faulty, monkeypatch, caplog):
    def surprise(*_):
        raise ZeroDivisionError("out of the blue")

    monkeypatch.setattr(faulty.validator._judge, "match", surprise)
    faulty.validator.run_forever(Stop(2))
    assert faulty.validator.faults == 3
    assert "ZeroDivisionError: out of the blue" in caplog.text


def test_a_closed_chain_and_a_wrong_configuration_end_the_loop(world, faulty):
    wrong = Station(world, "wrong", ScoringOptions(submit_margin=TEMPO))
    with pytest.raises(UserError, match="submit_margin must be less than the chain's tempo, 12"):
        wrong.validator.run_forever(Stop(5))
    wrong.close()
    faulty.chain.faults["snapshot"] = iter([Code.CLOSED])
    with pytest.raises(LedgerError, match="closed"):
        faulty.validator.run_forever(Stop(5))


def test_audits_that_wait_are_not_waited_for(world, station):
    miners = [Miner(world, name) for name in ("one", "two", "three", "four")]
    ticks = itertools.count()
    station.validator._judge._clock = lambda: next(ticks)  # each audit takes longer than a poll may wait
    station.round()
    for _ in range(3):
        for miner in miners:
            miner.contribute()
        world.finish_epoch(*miners)
        world.advance()
    world.advance(3)
    stop = Stop(30)
    station.validator.run_forever(stop)
    assert stop.pauses.count(0) > 5
    verdicts = [v for miner in miners for v in station.verdicts(miner).values()]
    assert set(verdicts) == {Verdict.PASSED, Verdict.NOT_DRAWN}


# The state


def test_a_state_file_of_another_run_version_or_kind_is_refused(tmp_path):
    path = tmp_path / "state.db"
    state = State(Database(path))
    state.open(run_id="one", hotkey="a")
    state.close()
    with pytest.raises(UserError, match="is of run_id one, not two: choose another path"):
        State(Database(path)).open(run_id="two", hotkey="a")
    database = Database(path)
    database.open()
    database.rows("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(UserError, match="version 7, this program writes version 2: move the file away"):
        Database(path).open()
    other = tmp_path / "ledger.db"
    World(tmp_path).close()
    with pytest.raises(UserError, match="is not a validator's state file"):
        Database(other).open()
    text = tmp_path / "text.db"
    text.write_text("no database " * 100)
    with pytest.raises(UserError, match="cannot open the state file"):
        Database(text).open()
    with pytest.raises(UserError, match="cannot open the state file"):
        Database(tmp_path).open()


def test_one_state_file_serves_one_validator_at_a_time(tmp_path):
    import subprocess
    import sys

    database = Database(tmp_path / "state.db")
    database.open()
    program = f"from hivetrain.validator.schema import Database; Database({str(tmp_path / 'state.db')!r}).open()"
    refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "is in use: another validator runs with it" in refused.stderr
    database.close()
    allowed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert allowed.returncode == 0, allowed.stderr


def test_a_failed_transaction_leaves_nothing(tmp_path):
    database = Database(tmp_path / "state.db")
    database.open()

    def fail():
        with database.transaction():
            database.write("INSERT INTO facts VALUES ('a', 'b')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert database.rows("SELECT * FROM facts") == []
    database.close()


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (ScoringOptions, {"alpha": 0}, "scoring.alpha"),
        (ScoringOptions, {"submit_margin": -1}, "scoring.submit_margin"),
        (ScoringOptions, {"poll_s": 0}, "scoring.poll_s"),
        (ScoringOptions, {"keep_tempos": 0}, "scoring.keep_tempos"),
        (ReplayOptions, {"precision": "64-true"}, "replay.precision must be one of 32-true, bf16-mixed"),
        (ReplayOptions, {"rows": 0}, "replay.rows"),
        (RunOptions, {"run_id": "a.b"}, "run.run_id"),
        (RunOptions, {"keep_epochs": 0}, "run.keep_epochs"),
        (ChainOptions, {"address": "x", "timeout_s": 0}, "chain.timeout_s"),
    ],
)
def test_options_out_of_range_are_refused(options, arguments, message):
    with pytest.raises(UserError, match=message):
        options(**arguments)


def test_a_validator_that_looks_too_seldom_to_tell_late_records_says_so(world, faulty, caplog):
    miner = Miner(world, "miner")

    def gaps():
        return [record.args for record in caplog.records if "since the last look" in record.message]

    epoch_of(world, miner, stations=[faulty], blocks=AUDITS.beacon_lag - 1)
    assert gaps() == []
    world.advance(AUDITS.beacon_lag)  # a replay takes so long
    faulty.round()
    assert gaps() == [(AUDITS.beacon_lag, AUDITS.beacon_lag)]


def test_a_validator_bounds_memory_and_time_of_a_replay_unless_told_otherwise():
    options = ReplayOptions()
    assert 1 <= options.rows <= 8
    assert options.most_rows <= 64


def test_the_submission_needs_a_registered_hotkey(world, faulty):
    miner = Miner(world, "miner")
    play_until(world, END - 1, faulty, miner)
    tempos = faulty.validator._tempos
    stranger = LocalChain(world.path, Hotkey.throwaway())
    world.advance()
    submission = Submission(stranger, faulty.state, tempos, 0, 5, T, ValidatorWatcher())
    faulty.chain.faults["submit"] = iter([Code.UNREACHABLE])
    faulty.round()
    submission.step(faulty.chain.snapshot(T))
    assert "is not registered" in faulty.status()[2]
    stranger.close()
