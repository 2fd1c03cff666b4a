"""How soon a miner that fakes part of its leaves is caught, against the formula.

The draws are the package's own, many of them; that an audit fails exactly when a drawn leaf is fake is checked by real
audits of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from attacks_miners import Claim, Miner, mean_gradient, mean_loss
from attacks_swarm import Economy, Swarm
from attacks_validator import Validator, block_hash

from hivetrain.contribution.beacon import draw
from hivetrain.contribution.rules import AuditRules

FAKED = (1.0, 0.5, 0.1)
ROUNDS = (1, 5, 11, 15, 30, 62)
LEAVES = 20


@dataclass(frozen=True)
class Detection:
    """Probability to be caught within ``rounds``, with ``faked`` of the leaves made up."""

    faked: float
    rounds: int
    measured: float
    formula: float


def detection(rules: AuditRules, trials: int, hotkey: str) -> list[Detection]:
    """Draws ``trials`` runs of rounds and counts in how many a fake leaf was among the drawn ones."""
    longest = max(ROUNDS)
    caught_in = {faked: [] for faked in FAKED}
    for trial in range(trials):
        first: dict[float, int] = {}
        for number in range(longest):
            drawn = draw(block_hash(f"trial {trial}", number), "attacks", number, hotkey, LEAVES, rules)
            for faked in FAKED:
                if faked not in first and any(index in fakes(faked) for index in drawn):
                    first[faked] = number + 1
            if len(first) == len(FAKED):
                break
        for faked in FAKED:
            caught_in[faked].append(first.get(faked, longest + 1))
    return [
        Detection(faked, rounds, sum(n <= rounds for n in caught_in[faked]) / trials, expected(rules, faked, rounds))
        for faked in FAKED
        for rounds in ROUNDS
    ]


def expected(rules: AuditRules, faked: float, rounds: int) -> float:
    """1 - (1 - p (1 - (1 - q)^m))^k."""
    return 1 - (1 - rules.probability * (1 - (1 - faked) ** rules.leaves)) ** rounds


def fakes(faked: float) -> range:
    """Which leaves are made up."""
    return range(round(faked * LEAVES))


def audits_agree(economy: Economy, chains: Sequence[str]) -> tuple[int, int]:
    """Audits contributions of ``LEAVES`` microbatches in which half or a tenth is made up.

    Returns:
        In how many audits the verdict was FAILED exactly if a drawn leaf was fake; the number of audits.
    """
    swarm = Swarm(replace(economy, microbatches=LEAVES, rules=replace(economy.rules, probability=1.0)))
    validator = Validator(swarm)
    validator.begin_round()
    right = done = 0
    for slot, faked in enumerate(FAKED):
        admitted = validator.admit(Miner(f"partial {faked}", slot, _partial(faked)).submit(swarm, 100))
        assert admitted is not None
        for chain in chains:
            judged = validator.judge(admitted, chain)
            beacon = block_hash(chain, 100 + swarm.economy.rules.beacon_lag)
            drawn = draw(beacon, economy.run_id, 0, judged.hotkey, LEAVES, swarm.economy.rules)
            right += (judged.verdict == "failed") == any(index in fakes(faked) for index in drawn)
            done += 1
    return right, done


def _partial(faked: float):  # type: ignore[no-untyped-def]
    def claim(miner: Miner, swarm: Swarm) -> Claim:
        done = miner.own_work(swarm)
        for index in fakes(faked):
            sketch = torch.randn(256, generator=miner.random)
            done[index] = replace(done[index], sketch=sketch * (done[index].sketch.norm() / sketch.norm()))
        return Claim(done, mean_gradient(done), mean_loss(done))

    return claim
