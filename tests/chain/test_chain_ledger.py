"""The laptop ledger: clock, eviction, sealed weights, many processes, sudden death."""

import json
import mmap
import os
import random
import signal
import sqlite3
import time
from contextlib import closing

import numpy as np
import pytest
from conftest import T, soon

from hivetrain.chain import ledger as ledger_module
from hivetrain.chain.base import Code, LedgerError, Outcome, Rules
from hivetrain.chain.ledger import IDLE_TEMPOS, Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.keys import Hotkey


class Clock:
    def __init__(self, seconds=1_000_000.0):
        self.seconds = seconds

    def __call__(self):
        return self.seconds


def address(number):
    return Hotkey.from_seed(number.to_bytes(32, "big")).address


def make(tmp_path, now=time.time, **rules):
    path = tmp_path / "ledger.db"
    Ledger.create(path, Rules(**({"tempo": 10, "rate_limit": 0, "block_time_s": 0.0} | rules)), now=now)
    return Ledger(path, now)


def query(ledger, sql, *args):
    with closing(sqlite3.connect(ledger._store.path)) as db:
        return db.execute(sql, args).fetchall()


def test_blocks_come_with_the_clock(tmp_path):
    clock = Clock()
    ledger = make(tmp_path, clock, block_time_s=12.0)
    assert ledger.clock(soon()) == (1, 12.0)
    clock.seconds += 11.5
    assert ledger.clock(soon()) == (1, 0.5)
    clock.seconds += 12.5
    assert ledger.clock(soon()) == (3, 12.0)
    behind = Ledger(ledger._store.path, Clock(clock.seconds - 30))
    assert behind.clock(soon())[0] == 3


def test_every_epoch_of_a_pause_is_applied(tmp_path):
    clock = Clock()
    ledger = make(tmp_path, clock, block_time_s=1.0)
    ledger.register(address(1), soon())
    ledger.set_stake(address(1), 5.0, soon())
    clock.seconds += 10 * 20
    assert ledger.clock(soon())[0] == 201
    assert query(ledger, "SELECT number FROM epochs") == [(number,) for number in range(1, 21)]
    assert ledger.earnings(soon()) == {address(1): 200.0}


def test_an_unused_ledger_stands_still(tmp_path):
    clock = Clock()
    ledger = make(tmp_path, clock, block_time_s=1.0)
    clock.seconds += 10 * IDLE_TEMPOS + 60
    assert ledger.clock(soon()) == (2, 1.0)
    clock.seconds += 1
    assert ledger.clock(soon())[0] == 3


def test_the_operator_may_hurry_a_clock(tmp_path):
    clock = Clock()
    ledger = make(tmp_path, clock, block_time_s=12.0)
    assert ledger.advance(25, soon()) == 26
    clock.seconds += 12
    assert ledger.clock(soon())[0] == 27


def test_block_hashes_do_not_exist_before_their_block_and_never_change(tmp_path):
    ledger = make(tmp_path)
    assert ledger.block_hash(2, soon()) is None
    ledger.advance(1, soon())
    drawn = ledger.block_hash(2, soon())
    ledger.advance(30, soon())
    assert Ledger(ledger._store.path).block_hash(2, soon()) == drawn


def test_two_ledgers_of_the_same_age_draw_different_hashes(tmp_path):
    hashes = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ledger = make(tmp_path / name, Clock())
        ledger.advance(3, soon())
        hashes |= {ledger.block_hash(block, soon()) for block in range(1, 5)}
    assert len(hashes) == 8


def full_subnet(tmp_path, **rules):
    """Four miners on four uids, paid 0, 1, 2, 3; all past their immunity of 5 blocks."""
    ledger = make(tmp_path, **({"max_uids": 4, "immunity_period": 5, "min_non_immune": 1} | rules))
    for uid in range(4):
        ledger.register(address(uid), soon())
    ledger.advance(6, soon())
    with closing(sqlite3.connect(ledger._store.path)) as db, db:
        db.execute("UPDATE neurons SET emission = uid")
    return ledger


def uids(ledger):
    return {neuron.hotkey: neuron.uid for neuron in ledger.snapshot(soon()).neurons}


def test_the_lowest_paid_goes_first(tmp_path):
    ledger = full_subnet(tmp_path)
    ledger.register(address(9), soon())
    assert uids(ledger) == {address(9): 0, address(1): 1, address(2): 2, address(3): 3}
    ledger.register(address(10), soon())
    assert uids(ledger)[address(10)] == 1


def test_among_equals_the_older_goes_first(tmp_path):
    ledger = full_subnet(tmp_path)
    with closing(sqlite3.connect(ledger._store.path)) as db, db:
        db.execute("UPDATE neurons SET emission = 0")
        db.execute("UPDATE neurons SET registered_at = 0 WHERE uid = 2")
    ledger.register(address(9), soon())
    assert uids(ledger)[address(9)] == 2
    ledger.register(address(10), soon())
    assert uids(ledger)[address(10)] == 0


def test_the_immune_go_when_too_few_others_are_left(tmp_path):
    ledger = full_subnet(tmp_path, min_non_immune=2)
    for number in (9, 10):
        ledger.register(address(number), soon())
    with closing(sqlite3.connect(ledger._store.path)) as db, db:
        db.execute("UPDATE neurons SET emission = 0.5 WHERE hotkey = ?", (address(9),))
    ledger.register(address(11), soon())  # two others are not more than two: the lowest of the immune goes
    assert uids(ledger) == {address(9): 0, address(11): 1, address(2): 2, address(3): 3}


def test_a_full_subnet_with_nobody_to_evict_refuses(tmp_path):
    ledger = full_subnet(tmp_path, min_non_immune=4)
    with pytest.raises(LedgerError) as caught:
        ledger.register(address(9), soon())
    assert caught.value.code == Code.FULL
    assert len(uids(ledger)) == 4


def test_the_owner_never_goes(tmp_path):
    ledger = full_subnet(tmp_path)
    ledger.change_rules(soon(), owner=address(0))
    ledger.register(address(9), soon())
    assert uids(ledger)[address(0)] == 0
    assert uids(ledger)[address(9)] == 1


def test_registration_is_charged_once(tmp_path):
    ledger = make(tmp_path, registration_cost=2.0)
    ledger.set_funds(address(1), 3.0, soon())
    ledger.register(address(1), soon())
    ledger.register(address(1), soon())
    assert query(ledger, "SELECT funds FROM accounts") == [(1.0,)]


def test_earnings_outlive_a_registration_and_bonds_do_not(tmp_path):
    ledger = make(tmp_path, max_uids=2, immunity_period=5, min_non_immune=0)
    validator, miner = address(1), address(2)
    ledger.register(validator, soon())
    ledger.register(miner, soon())
    ledger.set_stake(validator, 9.0, soon())
    ledger.advance(9, soon())
    ledger.submit_weights(validator, {miner: 1.0}, 0, soon())
    ledger.advance(10, soon())
    paid = ledger.earnings(soon())[miner]
    assert paid == pytest.approx(5.0)
    with closing(sqlite3.connect(ledger._store.path)) as db, db:
        db.execute("UPDATE neurons SET emission = 0 WHERE hotkey = ?", (miner,))
    ledger.register(address(3), soon())
    assert uids(ledger) == {validator: 0, address(3): 1}
    (bonds,) = query(ledger, "SELECT bonds FROM neurons WHERE uid = 0")[0]
    assert np.frombuffer(bonds).tolist() == [0.0, 0.0]
    ledger.advance(10, soon())
    assert ledger.earnings(soon())[miner] == paid


def sealed_subnet(tmp_path, **rules):
    ledger = make(tmp_path, commit_reveal=True, **rules)
    for number in (1, 2):
        ledger.register(address(number), soon())
    ledger.set_stake(address(1), 1.0, soon())
    ledger.advance(9, soon())
    return ledger


def test_a_sealed_row_is_applied_at_its_epoch_and_not_before(tmp_path):
    ledger = sealed_subnet(tmp_path, reveal_period=2)
    assert ledger.submit_weights(address(1), {address(2): 1.0}, 0, soon()).outcome == Outcome.COMMITTED
    ledger.advance(10, soon())
    assert ledger.weights(soon()) == {}
    assert ledger.snapshot(soon()).neuron(address(2)).incentive == 0
    ledger.advance(10, soon())
    assert ledger.weights(soon()) == {address(1): {address(2): 1.0}}
    assert ledger.snapshot(soon()).neuron(address(2)).incentive == 1
    assert query(ledger, "SELECT * FROM commits") == []


def test_an_expired_row_is_dropped(tmp_path):
    ledger = sealed_subnet(tmp_path)
    ledger.submit_weights(address(1), {address(2): 1.0}, 0, soon())
    with closing(sqlite3.connect(ledger._store.path)) as db, db:
        db.execute("UPDATE commits SET epoch = 1")
    ledger.advance(10, soon())
    assert ledger.weights(soon()) == {}
    assert query(ledger, "SELECT * FROM commits") == []


def test_stored_weights_are_max_scaled_u16(tmp_path):
    ledger = make(tmp_path)
    for number in (1, 2, 3):
        ledger.register(address(number), soon())
    ledger.set_stake(address(1), 1.0, soon())
    ledger.advance(9, soon())
    ledger.submit_weights(address(1), {address(2): 0.2, address(3): 0.4}, 0, soon())
    (blob,) = query(ledger, "SELECT weights FROM neurons WHERE uid = 0")[0]
    assert np.frombuffer(blob, "<u2").tolist() == [1, 32768, 2, 65535]


def test_a_silent_validator_loses_its_say(tmp_path):
    ledger = make(tmp_path, activity_cutoff=15)
    for number in (1, 2):
        ledger.register(address(number), soon())
    ledger.set_stake(address(1), 1.0, soon())
    ledger.advance(9, soon())
    ledger.submit_weights(address(1), {address(2): 1.0}, 0, soon())
    ledger.advance(10, soon())
    assert ledger.snapshot(soon()).neuron(address(2)).incentive == 1
    ledger.advance(10, soon())
    view = ledger.snapshot(soon())
    assert view.neuron(address(2)).incentive == 0
    assert not view.neuron(address(1)).active


def test_a_missing_ledger_says_how_to_make_one_and_makes_none(tmp_path):
    chain = LocalChain(tmp_path / "none.db", address(1))
    with pytest.raises(LedgerError, match="hivetrain ledger create") as caught:
        chain.snapshot(T)
    assert caught.value.code == Code.UNREACHABLE
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b""])
def test_a_foreign_file_is_no_ledger(tmp_path, content):
    (tmp_path / "x.db").write_bytes(content)
    with pytest.raises(LedgerError) as caught:
        LocalChain(tmp_path / "x.db", address(1)).snapshot(T)
    assert caught.value.code == Code.INCOMPATIBLE


def test_creating_leaves_an_existing_file_alone(tmp_path):
    ledger = make(tmp_path)
    ledger.register(address(1), soon())
    with pytest.raises(FileExistsError):
        make(tmp_path)
    assert list(uids(ledger)) == [address(1)]
    assert sorted(file.name for file in tmp_path.iterdir() if not file.name.startswith("ledger.db")) == []


def test_a_locked_ledger_is_given_up_at_the_deadline(tmp_path):
    ledger = make(tmp_path)
    with closing(sqlite3.connect(ledger._store.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        with pytest.raises(LedgerError) as caught:
            LocalChain(ledger._store.path, address(1)).register(0.3)
        assert caught.value.code == Code.UNREACHABLE
        assert 0.2 < time.monotonic() - start < 1.3


def test_a_forked_child_uses_the_ledger_of_its_parent(tmp_path):
    ledger = make(tmp_path)
    ledger.register(address(1), soon())
    run_processes([lambda: ledger.register(address(2), soon())])
    ledger.register(address(3), soon())
    assert uids(ledger) == {address(1): 0, address(2): 1, address(3): 2}


def run_processes(jobs, timeout_s=60):
    """Run each job in a forked child; fail if one of them does."""
    children = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                job()
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    end = time.monotonic() + timeout_s
    for pid in children:
        done, status = 0, 0
        while not done and time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)
        if not done:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert done, "a child did not end in time"
        assert status == 0, "a child failed"


def test_sixteen_processes_registering_and_setting_weights_lose_nothing(tmp_path):
    ledger = make(tmp_path)
    numbers = range(1, 17)
    for number in numbers:
        ledger.set_stake(address(number), float(number), soon())
    path = ledger._store.path
    ledger.close()

    def register(number):
        chain = LocalChain(path, address(number))
        chain.register(30)
        chain.publish("8.8.8.8", 1000 + number, 30)

    def submit(number):
        weights = {address(other): float(number * other) for other in numbers if other != number}
        for _ in range(5):
            assert LocalChain(path, address(number)).submit_weights(weights, 0, 30).outcome == Outcome.APPLIED

    run_processes([lambda number=number: register(number) for number in numbers])
    ledger = Ledger(path)
    view = ledger.snapshot(soon())
    assert sorted(neuron.uid for neuron in view.neurons) == list(range(16))
    assert {neuron.hotkey: neuron.port for neuron in view.neurons} == {address(n): 1000 + n for n in numbers}
    ledger.advance(9, soon())
    ledger.close()
    run_processes([lambda number=number: submit(number) for number in numbers])
    rows = Ledger(path).weights(soon())
    assert set(rows) == {address(number) for number in numbers}
    for number in numbers:
        total = sum(other for other in numbers if other != number)
        expected = {address(other): other / total for other in numbers if other != number}
        assert rows[address(number)] == pytest.approx(expected, abs=1e-4)


def busy_subnet(tmp_path):
    """32 neurons that all have weights and bonds, so that most of a block's time is spent in its epoch."""
    ledger = make(tmp_path, tempo=1, emission_per_block=3.0)
    rng = np.random.default_rng(0)
    for number in range(32):
        ledger.register(address(number), soon())
        ledger.set_stake(address(number), 1.0 + number, soon())
    ledger.advance(1, soon())
    for number in range(32):
        weights = {address(other): float(rng.random()) for other in range(32) if other != number}
        ledger.submit_weights(address(number), weights, 0, soon())
    ledger.advance(1, soon())
    ledger.close()
    return ledger._store.path


def advance_and_tell(path, inside):
    """Run epochs without end; the first byte of ``inside`` is 1 while one is being computed and written."""
    run_epoch = ledger_module.run_epoch

    def told(*args):
        inside[0] = 1
        run_epoch(*args)

    ledger_module.run_epoch = told
    ledger = Ledger(path)
    while True:
        ledger.advance(1, soon(60))
        inside[0] = 0


def kill_and_check(path, draw, times):
    """Kill a process that runs epochs, again and again; returns the last block and the kills that hit an epoch."""
    hits = 0
    with mmap.mmap(-1, 1) as inside:
        for _ in range(times):
            inside[0] = 0
            pid = os.fork()
            if pid == 0:
                try:
                    advance_and_tell(path, inside)
                finally:
                    os._exit(1)
            time.sleep(0.002 + 0.03 * draw.random())
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            hits += inside[0]
            ledger = Ledger(path)
            view = ledger.snapshot(soon())
            assert query(ledger, "PRAGMA integrity_check") == [("ok",)]
            # The ledger starts at block 1, so with a tempo of 1 the epochs are those of blocks 2, 3, 4, ...
            epochs = query(ledger, "SELECT count(*), min(block), max(block) FROM epochs")
            assert epochs == [(view.block - 1, 2, view.block)]
            assert sum(ledger.earnings(soon()).values()) == pytest.approx(3.0 * (view.block - 1), rel=1e-9)
            assert ledger.block_hash(view.block, soon()) == view.block_hash
            ledger.close()
    return view.block, hits


def test_kill_9_at_50_random_points_applies_each_epoch_once(tmp_path):
    block, hits = kill_and_check(busy_subnet(tmp_path), random.Random(5), 50)
    assert block > 50, "the killed processes hardly came to work"
    assert hits > 10, "the kills missed the epochs"


@pytest.mark.slow
def test_kill_9_at_1000_random_points_applies_each_epoch_once(tmp_path):
    _, hits = kill_and_check(busy_subnet(tmp_path), random.Random(6), 1000)
    assert hits > 200


def test_rules_survive_the_file_and_bad_ones_are_refused(tmp_path):
    ledger = make(tmp_path, min_weights=3, owner=address(4))
    ledger.change_rules(soon(), rate_limit=7)
    rules = Ledger(ledger._store.path).snapshot(soon()).rules
    assert (rules.min_weights, rules.rate_limit, rules.owner) == (3, 7, address(4))
    assert json.loads(query(ledger, "SELECT rules FROM chain")[0][0])["rate_limit"] == 7
    with pytest.raises(ValueError, match="tempo"):
        ledger.change_rules(soon(), tempo=3)
    with pytest.raises(ValueError, match="kappa"):
        ledger.change_rules(soon(), kappa=2.0)
    with pytest.raises(ValueError, match="address"):
        ledger.set_stake("nobody", 1.0, soon())
    with pytest.raises(ValueError, match="finite"):
        ledger.set_stake(address(1), float("nan"), soon())
