"""What every chain promises, asked of all three implementations."""

import math
import os
import threading
import time

import pytest
from conftest import BittensorSubnet, T, soon

from hivetrain.chain.base import Code, LedgerError, Outcome
from hivetrain.keys import Hotkey

STRANGER = Hotkey.from_seed(b"\x33" * 32).address


def refused(code, call, *args):
    with pytest.raises(LedgerError) as caught:
        call(*args)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.fixture
def validator(subnet):
    """A validator with stake and permit, past its rate limit, and two miners."""
    chain = subnet.join(stake=100.0)
    chain.miners = [subnet.join() for _ in range(2)]
    subnet.to_epoch()
    return chain


def test_a_newcomer_registers_and_is_seen(subnet):
    chain = subnet.open()
    assert chain.snapshot(T).neuron(chain.hotkey) is None
    receipt = chain.register(T)
    assert receipt.outcome == Outcome.APPLIED
    view = chain.snapshot(T)
    neuron = view.neuron(chain.hotkey)
    assert (neuron.uid, neuron.registered_at, neuron.last_update) == (0, view.block, view.block)
    assert not neuron.permit
    assert "already" in chain.register(T).detail
    assert len(chain.snapshot(T).neurons) == 1


def test_a_snapshot_tells_the_rules_and_the_hash_of_its_block(subnet):
    chain = subnet.open()
    subnet.advance(2)
    view = chain.snapshot(T)
    assert (view.tempo, view.rules.rate_limit, view.rules.consensus, view.next_epoch) == (10, 4, "yuma", 10)
    assert view.block_hash == chain.block_hash(view.block, T)
    assert len(view.block_hash) == 66
    assert chain.block_hash(view.block + 1, T) is None


def test_weights_become_pay_at_the_next_epoch(subnet, validator):
    first, second = (miner.hotkey for miner in validator.miners)
    receipt = validator.submit_weights({first: 3.0, second: 1.0}, 0, T)
    assert (receipt.outcome, receipt.dropped) == (Outcome.APPLIED, ())
    assert receipt.block == validator.snapshot(T).block
    subnet.to_epoch()
    view = validator.snapshot(T)
    assert view.neuron(first).incentive == pytest.approx(0.75, abs=1e-4)
    assert view.neuron(second).incentive == pytest.approx(0.25, abs=1e-4)
    assert view.neuron(validator.hotkey).dividends == pytest.approx(1.0, abs=1e-4)
    assert view.neuron(first).emission == pytest.approx(3.75, abs=1e-3)
    assert validator.weights(T)[validator.hotkey] == pytest.approx({first: 0.75, second: 0.25}, abs=1e-4)


def test_an_evicted_hotkey_is_dropped_and_its_successor_gets_nothing(subnet, validator):
    subnet.operator.change_rules(soon(), max_uids=3, min_non_immune=0)
    first, second = (miner.hotkey for miner in validator.miners)
    validator.submit_weights({first: 1.0, second: 1.0}, 0, T)
    subnet.to_epoch(3)
    validator.submit_weights({second: 1.0}, 0, T)
    subnet.to_epoch()
    newcomer = subnet.join()
    view = validator.snapshot(T)
    assert view.neuron(first) is None
    uid = view.neuron(newcomer.hotkey).uid
    assert uid == 1
    receipt = validator.submit_weights({first: 9.0, second: 1.0}, 0, T)
    assert receipt.dropped == (first,)
    subnet.to_epoch()
    view = validator.snapshot(T)
    assert view.neuron(newcomer.hotkey).incentive == 0.0
    assert view.neuron(second).incentive == pytest.approx(1.0)


def test_weights_of_the_evicted_do_not_pay_the_newcomer(subnet, validator):
    subnet.operator.change_rules(soon(), max_uids=3, min_non_immune=0, immunity_period=1)
    first, second = (miner.hotkey for miner in validator.miners)
    validator.submit_weights({first: 0.001, second: 1.0}, 0, T)
    subnet.to_epoch()
    newcomer = subnet.join()
    assert validator.snapshot(T).neuron(first) is None
    subnet.to_epoch()
    assert validator.snapshot(T).neuron(newcomer.hotkey).incentive == 0.0
    assert validator.weights(T)[validator.hotkey] == {second: 1.0}


def test_unfit_weights_are_refused(subnet, validator):
    for weight in (math.nan, math.inf, -math.inf, -1.0, 0.0, True, "1"):
        refused(Code.INVALID_WEIGHTS, validator.submit_weights, {validator.miners[0].hotkey: weight}, 0, T)


def test_duplicate_and_unknown_weights_are_refused(subnet, validator):
    miner = validator.miners[0].hotkey
    refused(Code.INVALID_WEIGHTS, validator.submit_weights, [(miner, 1.0), (miner, 1.0)], 0, T)
    refused(Code.INVALID_WEIGHTS, validator.submit_weights, {"nobody": 1.0}, 0, T)
    refused(Code.INVALID_WEIGHTS, validator.submit_weights, {STRANGER: 1.0}, 0, T)
    refused(Code.INVALID_WEIGHTS, validator.submit_weights, {}, 0, T)


def test_too_few_weights_are_refused(subnet, validator):
    subnet.operator.change_rules(soon(), min_weights=2)
    refused(Code.INVALID_WEIGHTS, validator.submit_weights, {validator.miners[0].hotkey: 1.0}, 0, T)
    receipt = validator.submit_weights({miner.hotkey: 1.0 for miner in validator.miners}, 0, T)
    assert receipt.outcome == Outcome.APPLIED


def test_large_shares_are_cut_to_the_maximum(subnet, validator):
    subnet.operator.change_rules(soon(), max_weight_share=0.6)
    first, second = (miner.hotkey for miner in validator.miners)
    validator.submit_weights({first: 99.0, second: 1.0}, 0, T)
    assert validator.weights(T)[validator.hotkey] == pytest.approx({first: 0.6, second: 0.4}, abs=1e-3)


def test_a_hotkey_without_a_uid_may_read_but_not_write(subnet):
    stranger = subnet.open()
    refused(Code.NOT_REGISTERED, stranger.submit_weights, {STRANGER: 1.0}, 0, T)
    refused(Code.NOT_REGISTERED, stranger.publish, "8.8.8.8", 80, T)
    assert stranger.snapshot(T).neurons == ()


def test_too_soon_says_how_many_blocks_to_wait(subnet, validator):
    weights = {validator.miners[0].hotkey: 1.0}
    validator.submit_weights(weights, 0, T)
    subnet.advance(1)
    assert refused(Code.RATE_LIMITED, validator.submit_weights, weights, 0, T).retry_after_blocks == 3
    subnet.advance(3)
    assert validator.submit_weights(weights, 0, T).outcome == Outcome.APPLIED


def test_a_new_validator_waits_a_full_rate_limit(subnet):
    subnet.advance(8)
    chain = subnet.join(stake=1.0)
    subnet.to_epoch()
    assert refused(Code.RATE_LIMITED, chain.submit_weights, {chain.hotkey: 1.0}, 0, T).retry_after_blocks == 3


def test_without_a_permit_weights_are_refused(subnet):
    chain = subnet.join(stake=1.0)
    miner = subnet.join()
    subnet.advance(5)
    refused(Code.NO_PERMIT, chain.submit_weights, {miner.hotkey: 1.0}, 0, T)
    subnet.to_epoch()
    assert chain.submit_weights({miner.hotkey: 1.0}, 0, T).outcome == Outcome.APPLIED


def test_stake_below_the_threshold_is_refused(subnet, validator):
    subnet.operator.change_rules(soon(), stake_threshold=1000.0)
    refused(Code.LOW_STAKE, validator.submit_weights, {validator.miners[0].hotkey: 1.0}, 0, T)


def test_an_old_version_is_refused(subnet, validator):
    subnet.operator.change_rules(soon(), version_key=3)
    refused(Code.STALE_VERSION, validator.submit_weights, {validator.miners[0].hotkey: 1.0}, 2, T)
    assert validator.submit_weights({validator.miners[0].hotkey: 1.0}, 3, T).outcome == Outcome.APPLIED


def test_sealed_weights_count_from_their_commit(subnet, validator):
    subnet.operator.change_rules(soon(), commit_reveal=True)
    weights = {validator.miners[0].hotkey: 1.0}
    assert validator.submit_weights(weights, 0, T).outcome == Outcome.COMMITTED
    view = validator.snapshot(T)
    assert view.neuron(validator.hotkey).last_update == view.block
    assert validator.weights(T) == {}
    refused(Code.RATE_LIMITED, validator.submit_weights, weights, 0, T)
    subnet.to_epoch()
    assert validator.weights(T)[validator.hotkey][validator.miners[0].hotkey] > 0


def test_an_axon_is_published_for_all(subnet, validator):
    validator.publish("8.8.4.4", 9000, T)
    validator.miners[0].publish("2001:db8::1", 9001, T)
    view = validator.miners[1].snapshot(T)
    assert view.neuron(validator.hotkey).axon == "8.8.4.4:9000"
    assert view.neuron(validator.miners[0].hotkey).axon == "[2001:db8::1]:9001"
    assert view.neuron(validator.miners[1].hotkey).axon is None
    for ip, port in [("nowhere", 1), ("127.0.0.1", 1), ("0.0.0.0", 1), ("8.8.8.8", 0), ("8.8.8.8", 70000)]:
        refused(Code.INVALID_ENDPOINT, validator.publish, ip, port, T)


def test_closed_registration_full_subnet_and_missing_funds(subnet):
    subnet.operator.change_rules(soon(), registration_cost=5.0)
    refused(Code.FUNDS, subnet.open().register, T)
    subnet.operator.change_rules(soon(), registration_cost=0.0, registration_open=False)
    refused(Code.CLOSED, subnet.open().register, T)
    subnet.operator.change_rules(soon(), registration_open=True, max_uids=1, owner=None)
    owner = subnet.join()
    subnet.operator.change_rules(soon(), owner=owner.hotkey)
    refused(Code.FULL, subnet.open().register, T)


def test_waiting_ends_with_the_block_or_the_deadline(subnet):
    chain = subnet.open()
    assert chain.wait_block(1, T) == 1
    start = time.monotonic()
    assert chain.wait_block(5, 0.2) == 1
    assert 0.2 <= time.monotonic() - start < 1.2
    waiter = threading.Thread(target=lambda: setattr(waiter, "seen", chain.wait_block(3, T)))
    waiter.start()
    subnet.advance(2)
    waiter.join(T)
    assert waiter.seen == 3


def test_a_closed_chain_refuses_calls_and_wakes_waiters(subnet):
    chain = subnet.open()
    seen = []

    def wait():
        try:
            chain.wait_block(10**6, 60.0)
        except LedgerError as error:
            seen.append(error.code)

    waiter = threading.Thread(target=wait)
    chain.snapshot(T)
    waiter.start()
    chain.close()
    chain.close()
    waiter.join(5)
    assert seen == [Code.CLOSED]
    refused(Code.CLOSED, chain.snapshot, T)


def test_the_beacon_differs_from_block_to_block(subnet):
    chain = subnet.open()
    subnet.advance(20)
    hashes = [chain.block_hash(block, T) for block in range(1, 22)]
    assert None not in hashes
    assert len(set(hashes)) == 21


def test_many_threads_may_share_one_chain(subnet):
    chain = subnet.open()
    views, errors = [], []

    def read():
        try:
            views.append(chain.snapshot(T))
        except LedgerError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(T)
    assert not errors
    assert len(views) == 8


def test_the_subnet_kind_is_what_it_says(subnet):
    expected = {"LocalSubnet": "LocalChain", "RemoteSubnet": "RemoteChain", "BittensorSubnet": "BittensorChain"}
    assert type(subnet.open()).__name__ == expected[type(subnet).__name__]
    assert isinstance(subnet, BittensorSubnet) == hasattr(subnet, "faults")


def test_a_chain_that_is_gone_is_unreachable_and_checks_weights_all_the_same(subnet):
    subnet.break_down()
    chain = subnet.open()
    refused(Code.UNREACHABLE, chain.snapshot, 0.3)
    refused(Code.UNREACHABLE, chain.submit_weights, {STRANGER: 1.0}, 0, 0.3)
    refused(Code.INVALID_WEIGHTS, chain.submit_weights, {STRANGER: math.nan}, 0, 0.3)


def test_a_chain_that_speaks_otherwise_is_incompatible(subnet):
    subnet.speak_otherwise()
    refused(Code.INCOMPATIBLE, subnet.open().snapshot, T)


def test_a_forked_child_uses_a_chain_of_its_parent(subnet):
    chain = subnet.join()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if chain.snapshot(T).neuron(chain.hotkey) else 2
        finally:
            os._exit(status)
    done, status, end = 0, None, time.monotonic() + T
    while not done and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)
    assert (done, status) == (pid, 0)
    assert chain.snapshot(T).neurons
