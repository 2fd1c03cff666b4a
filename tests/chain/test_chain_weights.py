import math

import pytest
from bittensor_core import Keypair, ss58_encode
from conftest import T, soon

from hivetrain.chain.base import Code, LedgerError, Outcome, Rules
from hivetrain.chain.weights import check_endpoint, check_row, clip_shares, parse_weights, split_registered, to_u16
from hivetrain.keys import Hotkey

A, B, C = (Hotkey.from_seed(bytes([seed]) * 32).address for seed in (1, 2, 3))
OTHER_SPELLING = ss58_encode(bytes(Keypair.create_from_seed(b"\1" * 32).public_key), 0)


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {A: math.nan},
        {A: math.inf},
        {A: -0.1, B: 1.0},
        {A: 0.0, B: 0.0},
        {A: True},
        {A: "1"},
        {A: 1e308, B: 1e308},
        {"miner": 1.0},
        {3: 1.0},
        {A: 1.0, OTHER_SPELLING: 1.0},
        [(A, 1.0), (B, 1.0), (A, 2.0)],
    ],
)
def test_unfit_weights_are_refused(weights):
    with pytest.raises(LedgerError) as caught:
        parse_weights(weights)
    assert caught.value.code == Code.INVALID_WEIGHTS


def test_hotkeys_without_a_uid_are_dropped_and_named():
    assert split_registered({A: 1.0, B: 2.0, C: 0.0}, {A: 7, C: 1}) == ({7: 1.0, 1: 0.0}, (B,))
    with pytest.raises(LedgerError, match="registered"):
        split_registered({A: 0.0, B: 2.0}, {A: 7})


def test_u16_scaling_keeps_proportions_and_forgets_dust():
    assert to_u16({3: 1.0, 1: 0.5, 2: 1e-7, 9: 0.0}, 1.0) == {1: 32768, 3: 65535}


def test_clipping_caps_every_share_and_keeps_the_sum():
    shares = clip_shares({0: 90.0, 1: 5.0, 2: 3.0, 3: 2.0}, 0.4)
    assert max(shares.values()) == pytest.approx(0.4)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[1] <= 0.4
    assert shares[2] / shares[3] == pytest.approx(1.5)
    assert clip_shares({0: 3.0, 1: 1.0}, 0.3) == {0: 0.5, 1: 0.5}


def test_a_row_must_meet_the_rules_of_the_subnet():
    rules = Rules(min_weights=2, max_weight_share=0.6)
    check_row({1: 65535, 2: 65535}, rules, 0, range(3))
    check_row({0: 65535}, rules, 0, range(3))
    for row in ({1: 65535}, {1: 65535, 2: 100}, {1: 1, 7: 1}, {}):
        with pytest.raises(LedgerError) as caught:
            check_row(row, rules, 0, range(3))
        assert caught.value.code == Code.INVALID_WEIGHTS


@pytest.mark.parametrize(
    ("ip", "port"),
    [("localhost", 1), ("127.0.0.1", 80), ("::ffff:127.0.0.1", 80), ("0.0.0.0", 80), ("224.0.0.1", 80), ("::1", 80)]
    + [("255.255.255.255", 80), ("169.254.0.1", 80), ("8.8.8.8", 0), ("8.8.8.8", 65536), ("8.8.8.8", True)],
)
def test_endpoints_nobody_can_reach_are_refused(ip, port):
    with pytest.raises(LedgerError) as caught:
        check_endpoint(ip, port, allow_loopback=False)
    assert caught.value.code == Code.INVALID_ENDPOINT


def test_loopback_needs_the_explicit_flag():
    assert check_endpoint("127.0.0.1", 80, allow_loopback=True) == "127.0.0.1"
    assert check_endpoint("2001:DB8::1", 80, allow_loopback=False) == "2001:db8::1"


def test_a_weight_on_oneself_is_always_taken_and_pays_nobody_else(subnet):
    validator, miner = subnet.join(stake=100.0), subnet.join().hotkey
    subnet.to_epoch()
    validator.submit_weights({miner: 1.0}, 0, T)
    subnet.to_epoch()
    assert validator.snapshot(T).neuron(miner).emission > 0
    subnet.operator.change_rules(soon(), min_weights=2, max_weight_share=0.5)
    assert validator.submit_weights({validator.hotkey: 1.0}, 0, T).outcome == Outcome.APPLIED
    assert validator.weights(T)[validator.hotkey] == {validator.hotkey: 1.0}
    subnet.to_epoch()
    for neuron in validator.snapshot(T).neurons:
        assert neuron.incentive == 0
        assert (neuron.emission > 0) == (neuron.hotkey == validator.hotkey)
