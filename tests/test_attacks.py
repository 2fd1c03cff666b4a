"""Attacks on the pay, judged in one process with real records, audits and scores; docs/scoring.md has the table."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import attacks_strategies as does  # noqa: E402
from attacks_detection import audits_agree, detection  # noqa: E402
from attacks_simulation import OURS, Attack, Findings, Simulation, attacks  # noqa: E402
from attacks_swarm import Economy  # noqa: E402

from hivetrain.contribution import audit  # noqa: E402
from hivetrain.contribution.audit import Tolerance, Verdict  # noqa: E402
from hivetrain.contribution.rules import AuditRules  # noqa: E402
from hivetrain.keys import Hotkey  # noqa: E402

# Few rounds: audited often instead, so that a cheat meets as many audits in a tempo as in the full run.
SMALL = Economy(
    rounds=8, tempo_rounds=4, honest=4, microbatches=3, width=32, block_size=32,
    rules=AuditRules(probability=0.6, leaves=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def economy_and_findings() -> tuple[list[Attack], Findings]:
    torch.set_num_threads(1)
    chosen = attacks(SMALL)
    return chosen, Simulation(SMALL, chosen, chains=25).run()


@pytest.fixture(scope="module")
def chosen(economy_and_findings) -> list[Attack]:
    return economy_and_findings[0]


@pytest.fixture(scope="module")
def findings(economy_and_findings) -> Findings:
    return economy_and_findings[1]


def paid(findings: Findings, strategy, rule: str = OURS) -> float:
    name = next(attack.name for attack in attacks(SMALL) if attack.strategy is strategy)
    return findings.relative_pay[name][rule]


def test_no_attack_pays_and_a_split_pays_nothing_more(chosen, findings):
    # A record that was honest once is paid once: one round of eight here, of sixty in the full run.
    once = (does.resent, does.same_data)
    excess = {
        attack.name: findings.relative_pay[attack.name][OURS]
        for attack in chosen
        if attack.proven
        and findings.relative_pay[attack.name][OURS] > (0.35 if attack.strategy in once else attack.bound)
    }
    assert not excess
    assert paid(findings, does.split) == pytest.approx(1, abs=0.05)


def test_honest_miners_are_never_accused(findings):
    assert set(findings.honest_verdicts) == {Verdict.PASSED, Verdict.NOT_DRAWN}
    assert findings.honest_verdicts[Verdict.PASSED] > 300


def test_without_the_replay_a_free_rider_would_be_paid_like_the_others(monkeypatch):
    monkeypatch.setitem(audit.TOLERANCES, "32-true", Tolerance(float("inf"), float("inf")))
    chosen = [attack for attack in attacks(SMALL) if attack.strategy is does.free_rider]
    findings = Simulation(replace(SMALL, rounds=2, tempo_rounds=2), chosen, chains=25).run()
    assert 0.8 < paid(findings, does.free_rider) < 1.2


def test_each_attack_meets_the_check_that_was_made_for_it(chosen, findings):
    expected = {
        does.no_reveal: Verdict.MISSING,
        does.late: Verdict.LATE,
        does.early: Verdict.EARLY,
        does.malformed: Verdict.INVALID,
        does.huge: Verdict.INVALID,
        does.billionfold_claim: Verdict.INVALID,
        does.unknown_precision: Verdict.INVALID,
        does.same_data: Verdict.INVALID,
        does.resent: Verdict.INVALID,
        does.free_rider: Verdict.FAILED,
        does.lazy: Verdict.FAILED,
        does.lazy_sequence: Verdict.FAILED,
        does.copied: Verdict.FAILED,
        does.easy_data: Verdict.FAILED,
        does.inflated: Verdict.FAILED,
        does.flipped: Verdict.FAILED,
    }
    for attack in chosen:
        if attack.strategy in expected:
            seen = findings.verdicts[attack.name]
            assert max(seen, key=seen.__getitem__) is expected[attack.strategy], attack.name


def test_other_bytes_than_the_committed_ones_flag_the_round_and_nothing_else(findings):
    flagged = {attack.strategy: findings.flagged[attack.name] for attack in attacks(SMALL)}
    assert flagged[does.split] == flagged[does.inflated] == 0
    for strategy in (does.other_bytes_inflated, does.other_bytes_flipped):
        assert flagged[strategy] == 1
        assert paid(findings, strategy) == pytest.approx(1, abs=0.05)


def test_earlier_rules_pay_those_who_do_nothing(findings):
    assert paid(findings, does.false_reporter, "MAD of losses") == float("inf")
    assert paid(findings, does.idle, "cosine of params") > 0.9
    assert paid(findings, does.free_rider, "cosine of params") > 0.9
    assert paid(findings, does.flipped, "cosine of params") > 0.9
    assert paid(findings, does.split, "MAD of losses") > 1.5


def test_detection_follows_the_formula():
    found = detection(AuditRules(), trials=800, hotkey=Hotkey.from_seed(bytes(32)).address)
    assert {(each.faked, each.rounds) for each in found} >= {(1.0, 11), (0.5, 15), (0.1, 62)}
    for each in found:
        assert each.measured == pytest.approx(each.formula, abs=0.05), each


def test_an_audit_fails_exactly_if_a_drawn_leaf_is_fake():
    right, audits = audits_agree(SMALL, [f"chain {number}" for number in range(8)])
    assert (right, audits) == (24, 24)
