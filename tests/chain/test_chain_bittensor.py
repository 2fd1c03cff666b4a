"""What only Bittensor can do wrong: lost answers, refused traffic, another runtime, money."""

import time
from types import SimpleNamespace

import pytest
from conftest import T, soon

from hivetrain.chain.base import Code, LedgerError, Outcome
from hivetrain.chain.pallet import RULE_ITEMS, code_of, rules_from_storage
from hivetrain.errors import UserError

bt = pytest.importorskip("bittensor")
fake = pytest.importorskip("fake_substrate")


def refused(code, call, *args):
    with pytest.raises(LedgerError) as caught:
        call(*args)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.fixture
def net(bittensor_subnet):
    """A validator that may set weights, a miner, and the faults of their node."""
    validator = bittensor_subnet.join(stake=100.0)
    miner = bittensor_subnet.join()
    bittensor_subnet.to_epoch()
    return SimpleNamespace(
        subnet=bittensor_subnet, faults=bittensor_subnet.faults, validator=validator, weights={miner.hotkey: 1.0}
    )


@pytest.fixture
def no_pause(monkeypatch):
    from hivetrain.chain import bittensor_session

    monkeypatch.setattr(bittensor_session, "BACKOFF_S", 0.001)


LOST = bt.RpcConnectionError("websocket closed")


def test_an_answer_lost_after_inclusion_is_found_on_the_chain_and_not_sent_again(net, no_pause):
    net.faults.submits = 0
    net.faults.order("after_submit", LOST, times=1)
    receipt = net.validator.submit_weights(net.weights, 0, T)
    assert (receipt.outcome, net.faults.submits) == (Outcome.APPLIED, 1)
    assert net.validator.weights(T)[net.validator.hotkey] == net.weights


def test_a_sealed_row_whose_answer_was_lost_is_still_called_sealed(net, no_pause):
    net.subnet.operator.change_rules(soon(), commit_reveal=True)
    net.faults.order("after_submit", LOST, times=1)
    assert net.validator.submit_weights(net.weights, 0, T).outcome == Outcome.COMMITTED


def test_an_answer_lost_for_good_is_unknown_and_the_chain_is_read_before_anything_is_sent_again(net, no_pause):
    net.faults.submits = 0
    net.faults.order("before_submit", LOST, times=1)
    receipt = net.validator.submit_weights(net.weights, 0, 0.5)
    assert (receipt.outcome, net.faults.submits) == (Outcome.UNKNOWN, 1)
    net.validator.submit_weights(net.weights, 0, T)
    assert net.faults.submits == 2
    refused(Code.RATE_LIMITED, net.validator.submit_weights, net.weights, 0, T)
    assert net.faults.submits == 2


def test_a_node_that_falls_silent_after_sending_leaves_the_outcome_unknown(net):
    net.faults.order("after_submit", "silence")
    start = time.monotonic()
    assert net.validator.submit_weights(net.weights, 0, 0.5).outcome == Outcome.UNKNOWN
    assert time.monotonic() - start < 1.5


def test_a_failure_the_pool_gives_no_name_to_is_not_taken_for_a_refusal(net, no_pause):
    net.faults.order("before_submit", bt.ChainError("connection reset while watching"), times=1)
    assert net.validator.submit_weights(net.weights, 0, 0.3).outcome == Outcome.UNKNOWN


def pool_says(name, message="the pool's words"):
    return bt.ExtrinsicResult(success=False, message=message, error=bt.ChainError(message, name))


@pytest.mark.parametrize("name", ["PriorityTooLow", "AlreadyImported", "Usurped", "Dropped", "Retracted", None])
def test_what_the_pool_leaves_open_is_settled_by_the_chain(net, name):
    net.faults.order("after_submit", pool_says(name), times=1)
    assert net.validator.submit_weights(net.weights, 0, T).outcome == Outcome.APPLIED
    net.subnet.advance(4)
    net.faults.order("before_submit", pool_says(name), times=1)
    assert net.validator.submit_weights(net.weights, 0, 0.2).outcome == Outcome.UNKNOWN


def test_an_outdated_transaction_is_sent_again_and_then_given_up_without_doubt(net):
    net.faults.submits = 0
    net.faults.order("before_submit", pool_says("Stale", "Transaction is outdated"), times=1)
    assert net.validator.submit_weights(net.weights, 0, T).outcome == Outcome.APPLIED
    assert net.faults.submits == 2
    net.subnet.advance(4)
    net.faults.order("before_submit", pool_says("Stale", "Transaction is outdated"))
    refused(Code.UNREACHABLE, net.validator.submit_weights, net.weights, 0, T)


def test_lost_registrations_and_axons_are_found_on_the_chain(net, no_pause):
    chain = net.subnet.open()
    net.faults.order("after_submit", LOST, times=1)
    assert chain.register(T).outcome == Outcome.APPLIED
    net.faults.order("after_submit", LOST, times=1)
    assert chain.publish("8.8.8.8", 80, T).outcome == Outcome.APPLIED


def test_reads_survive_a_dropped_connection(net, no_pause):
    before = net.faults.connects
    net.faults.order("read", LOST, times=2)
    assert net.validator.snapshot(T).neurons
    assert net.faults.connects > before


def test_reconnects_wait_longer_each_time_and_not_all_at_once(net, monkeypatch):
    from hivetrain.chain import bittensor_session

    monkeypatch.setattr(bittensor_session, "BACKOFF_S", 0.02)
    net.faults.order("connect", LOST)
    pauses = {}
    for jitter in (0.0, 1.0):
        chain = net.subnet._make(net.subnet.wallet(), jitter=lambda jitter=jitter: jitter)
        net.faults.connects = 0
        start = time.monotonic()
        refused(Code.UNREACHABLE, chain.snapshot, 0.5)
        pauses[jitter] = net.faults.connects
        assert time.monotonic() - start < 1.5
        chain.close()
    assert 3 <= pauses[1.0] <= pauses[0.0] + 1 <= 8


def test_a_node_that_is_down_and_comes_back_is_used_again(net, no_pause):
    net.faults.order("connect", LOST, times=3)
    chain = net.subnet.open()
    assert chain.snapshot(T).neurons


def test_refused_traffic_is_not_tried_again_before_its_time(net):
    net.faults.order("read", bt.RpcPolicyError("HTTP 429", status_code=429, retry_after="30"), times=1)
    refused(Code.UNREACHABLE, net.validator.snapshot, T)
    before = net.faults.connects
    start = time.monotonic()
    error = refused(Code.UNREACHABLE, net.validator.snapshot, T)
    assert time.monotonic() - start < 1
    assert "29." in error.message or "30." in error.message
    assert net.faults.connects == before
    refused(Code.UNREACHABLE, net.validator.submit_weights, net.weights, 0, T)


def test_traffic_resumes_when_the_refusal_is_over(net):
    net.faults.order("read", bt.RpcPolicyError("HTTP 429", status_code=429, retry_after="0.1"), times=1)
    refused(Code.UNREACHABLE, net.validator.snapshot, T)
    assert net.validator.snapshot(T).neurons


def test_another_runtime_is_incompatible(net):
    from bittensor._transport.errors import StorageFunctionNotFound

    net.faults.order("read", StorageFunctionNotFound("Storage function SubtensorModule.Tempo not found"), times=1)
    error = refused(Code.INCOMPATIBLE, net.validator.snapshot, T)
    assert bt.__version__ in error.message


def test_a_subnet_that_does_not_exist_is_incompatible(net):
    from hivetrain.chain.bittensor import BittensorChain

    substrate = net.subnet._make(net.subnet.wallet())._sessions._access
    chain = BittensorChain("local", 999, net.subnet.wallet(), substrate=substrate)
    refused(Code.INCOMPATIBLE, chain.snapshot, T)
    refused(Code.INCOMPATIBLE, chain.weights, T)
    chain.close()


def test_nothing_is_signed_for_a_sure_refusal(net):
    net.faults.submits = 0
    for weight in (float("nan"), float("inf"), -1.0, 0.0):
        refused(Code.INVALID_WEIGHTS, net.validator.submit_weights, dict.fromkeys(net.weights, weight), 0, T)
    net.subnet.operator.change_rules(soon(), version_key=5)
    refused(Code.STALE_VERSION, net.validator.submit_weights, net.weights, 0, T)
    net.subnet.operator.change_rules(soon(), version_key=0, stake_threshold=1e6)
    refused(Code.LOW_STAKE, net.validator.submit_weights, net.weights, 0, T)
    refused(Code.INVALID_ENDPOINT, net.validator.publish, "127.0.0.1", 80, T)
    assert net.faults.submits == 0


def test_the_consensus_mode_is_read_and_not_assumed():
    values = dict.fromkeys(RULE_ITEMS, 1)
    for raw, name in [("Yuma", "yuma"), ("Null", "null"), ({"Null": None}, "null"), (0, "yuma"), (1, "null")]:
        assert rules_from_storage(values | {"SubnetEpochConsensus": raw}).consensus == name
    for raw in ("Other", 7, {}):
        refused(Code.INCOMPATIBLE, rules_from_storage, values | {"SubnetEpochConsensus": raw})
    error = refused(Code.INCOMPATIBLE, rules_from_storage, values | {"Kappa": None})
    assert "Kappa" in error.message


def test_every_rule_item_is_in_the_sdk_s_catalogue():
    items = bt.storage.SubtensorModule
    assert [item for item in RULE_ITEMS if not hasattr(items, item)] == []


def test_chain_errors_have_the_codes_of_this_project():
    assert code_of("SettingWeightsTooFast", "rate_limited") == Code.RATE_LIMITED
    assert code_of("NotEnoughStakeToSetWeights", "insufficient_balance") == Code.LOW_STAKE
    assert code_of("NeuronNoValidatorPermit", "not_authorized") == Code.NO_PERMIT
    assert code_of("SubNetRegistrationDisabled", "disabled") == Code.CLOSED
    assert code_of(None, "insufficient_balance") == Code.FUNDS
    assert code_of("SomethingNew", "unknown") == Code.INCOMPATIBLE


def registering(net, **options):
    chain = net.subnet._make(net.subnet.wallet(), **options)
    net.subnet.chains.append(chain)
    return chain


def test_registration_is_off_unless_limit_and_consent_are_given(net):
    net.faults.submits = 0
    net.subnet.operator.change_rules(soon(), registration_cost=0.5)
    asked = []
    for options in (
        {"registration_limit_tao": None},
        {"confirm": None},
        {"confirm": lambda cost: asked.append(cost) or False},
    ):
        error = refused(Code.CLOSED, registering(net, **options).register, T)
    assert asked == [0.5]
    assert "not confirmed" in error.message
    refused(Code.FUNDS, registering(net, registration_limit_tao=0.4).register, T)
    assert net.faults.submits == 0
    assert registering(net, registration_limit_tao=0.5).register(T).outcome == Outcome.APPLIED


def test_a_price_that_rises_after_the_consent_is_not_paid(net):
    net.subnet.operator.change_rules(soon(), registration_cost=0.5)

    def raise_price(cost):
        net.subnet.operator.change_rules(soon(), registration_cost=50.0)
        return True

    chain = registering(net, confirm=raise_price)
    refused(Code.FUNDS, chain.register, T)
    assert chain.snapshot(T).neuron(chain.hotkey) is None


def test_registration_needs_a_readable_coldkey(net, tmp_path):
    wallet = net.subnet.wallet()
    wallet.coldkey_file.unlink()
    chain = net.subnet.open(wallet)
    with pytest.raises(UserError, match="coldkey"):
        chain.register(T)


def test_an_unknown_network_is_a_clear_error():
    from hivetrain.chain import open_chain

    for address in ("bittensor:nowhere/1", "bittensor:test", "bittensor:/1", "bittensor:test/x", "ftp://host", ""):
        with pytest.raises(UserError):
            open_chain(address)
