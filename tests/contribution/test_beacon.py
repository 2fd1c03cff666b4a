"""Draws: fair, distinct, and the same everywhere."""

import hashlib
from collections import Counter

import pytest

from hivetrain.contribution.beacon import beacon_block, draw
from hivetrain.contribution.rules import AuditRules
from hivetrain.keys import Hotkey

HASH = "0x" + "5a" * 32
ADDRESS = "5HNQW7Sx5XY6jsPvPtN1XkWPiaqygU5AMMSqKyPAFAHWLwpK"
ALWAYS = AuditRules(probability=1.0)


def block_hash(number: int) -> str:
    return "0x" + hashlib.sha256(str(number).encode()).hexdigest()


def test_the_draws_of_a_fixed_block_never_change():
    assert [draw(HASH, "run-1", epoch, ADDRESS, 1000, ALWAYS) for epoch in range(3)] == [
        (120, 881),
        (659, 807),
        (745, 927),
    ]
    rules = AuditRules(probability=0.25, leaves=3)
    assert [epoch for epoch in range(30) if draw(HASH, "run-1", epoch, ADDRESS, 1000, rules)] == [0, 11, 15, 18, 19, 20]


def test_audits_come_as_often_as_the_rules_say():
    for probability in (0.05, 0.25, 0.7):
        rules = AuditRules(probability=probability)
        count = sum(bool(draw(block_hash(number), "run", 3, ADDRESS, 50, rules)) for number in range(4000))
        assert abs(count / 4000 - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_hotkeys_are_drawn_independently_of_each_other():
    addresses = [Hotkey.from_seed(number.to_bytes(32, "big")).address for number in range(40)]
    drawn = Counter(sum(bool(draw(block_hash(n), "run", 3, a, 50, AuditRules())) for a in addresses) for n in range(60))
    mean = sum(size * times for size, times in drawn.items()) / 60
    spread = sum((size - mean) ** 2 * times for size, times in drawn.items()) / 60
    assert abs(mean - 10) < 1.5
    assert 3.5 < spread < 13  # 40 independent draws of 1/4 have a variance of 7.5


def test_probabilities_of_none_and_all_are_exact():
    never = AuditRules(probability=0.0)
    assert all(draw(block_hash(number), "run", 0, ADDRESS, 9, never) == () for number in range(300))
    assert all(draw(block_hash(number), "run", 0, ADDRESS, 9, ALWAYS) for number in range(300))


def test_leaves_are_distinct_rising_and_uniform():
    rules = AuditRules(probability=1.0, leaves=3)
    counts = Counter()
    for number in range(3000):
        drawn = draw(block_hash(number), "run", 1, ADDRESS, 7, rules)
        assert len(drawn) == 3
        assert list(drawn) == sorted(set(drawn))
        counts.update(drawn)
    assert set(counts) == set(range(7))
    assert all(abs(count - 9000 / 7) < 130 for count in counts.values())  # the standard deviation is 27


@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
def test_all_leaves_are_drawn_where_there_are_no_more(microbatches):
    rules = AuditRules(probability=1.0, leaves=8)
    assert draw(HASH, "run", 1, ADDRESS, microbatches, rules) == tuple(range(microbatches))


def test_every_argument_counts():
    rules = AuditRules(probability=1.0, leaves=4)
    draws = {
        draw(HASH, "run", 1, ADDRESS, 60000, rules),
        draw(block_hash(1), "run", 1, ADDRESS, 60000, rules),
        draw(HASH, "other", 1, ADDRESS, 60000, rules),
        draw(HASH, "run", 2, ADDRESS, 60000, rules),
        draw(HASH, "run", 1, Hotkey.from_seed(b"\x01" * 32).address, 60000, rules),
        draw(HASH, "run", 1, ADDRESS, 60001, rules),
    }
    assert len(draws) == 6


def test_the_spelling_of_a_block_hash_does_not_count():
    upper = HASH[2:].upper()
    assert draw(upper, "run", 1, ADDRESS, 500, ALWAYS) == draw(HASH, "run", 1, ADDRESS, 500, ALWAYS)


@pytest.mark.parametrize("wrong", ["", "0x", "0x12", "zz" * 32, "5a" * 33])
def test_what_is_no_block_hash_is_refused(wrong):
    with pytest.raises(ValueError, match=r"no draw|hexadecimal"):
        draw(wrong, "run", 1, ADDRESS, 5, ALWAYS)


def test_there_is_no_draw_among_no_leaves():
    with pytest.raises(ValueError, match="among 0 leaves"):
        draw(HASH, "run", 1, ADDRESS, 0, ALWAYS)


def test_the_beacon_is_the_block_that_lies_the_lag_behind(make_log, make_contribution, hotkey):
    record = make_contribution(make_log(2), hotkey, block=100)
    assert beacon_block(record, AuditRules(beacon_lag=5)) == 105


def test_rules_have_fingerprints_of_their_own():
    assert AuditRules().fingerprint.hex() == "6f2607aabf383ccb0d1fe8448ad483fc"
    others = [
        AuditRules(probability=0.26),
        AuditRules(leaves=3),
        AuditRules(beacon_lag=4),
        AuditRules(reveal_blocks=11),
        ALWAYS,
    ]
    assert len({rules.fingerprint for rules in (AuditRules(), *others)}) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"probability": -0.1},
        {"probability": 1.1},
        {"probability": float("nan")},
        {"leaves": 0},
        {"leaves": 9},
        {"beacon_lag": 0},
        {"reveal_blocks": 0},
    ],
)
def test_rules_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="between"):
        AuditRules(**wrong)
