"""Three rules by which earlier systems pay, written from their descriptions, to see what they pay to the same miners.

The surprising fact: none of them is asked for anything that an attacker could not know or make up.
"""

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from attacks_miners import Submission, mean_gradient
from attacks_swarm import START, Swarm
from torch import Tensor

OUTLIER_MADS = 2.0
RELATIVE_STEP = 0.1
GAIN_STEP = 0.02
EVALUATED = 8
TRAINED_SHARE = 0.19
OTHER_BLOCKS = 300
POOL = 12  # sequences of each kind, out of which the validators choose
VALIDATORS = 4
EMA = 0.1


class EarlierRule(ABC):
    """One rule; sees what each miner sends and tells, and pays shares of each round."""

    name: str

    @abstractmethod
    def observe(self, submission: Submission, swarm: Swarm) -> float | None:
        """What the rule measures of a miner in this round; None if there is nothing to measure."""

    @abstractmethod
    def scores(self, observed: Mapping[str, float | None]) -> dict[str, float]:
        """Scores of all miners of a round, by hotkey."""

    def shares(self, observed: Mapping[str, float | None]) -> dict[str, float]:
        """The same, with sum 1 unless nobody is paid."""
        scores = self.scores(observed)
        total = sum(scores.values())
        return {hotkey: score / total if total else 0.0 for hotkey, score in scores.items()}


class DeviationOfLosses(EarlierRule):
    """Every miner reports its loss; who is farther than 2 MAD from the median gets nothing, the others get the same."""

    name = "MAD of losses"

    def observe(self, submission: Submission, swarm: Swarm) -> float | None:
        return submission.claim.loss

    def scores(self, observed: Mapping[str, float | None]) -> dict[str, float]:
        told = [loss for loss in observed.values() if loss is not None]
        median = statistics.median(told)
        deviation = statistics.median(abs(loss - median) for loss in told)
        return {
            hotkey: float(loss is not None and abs(loss - median) <= OUTLIER_MADS * deviation)
            for hotkey, loss in observed.items()
        }


class CosineOfParams(EarlierRule):
    """The validator repeats the miner's update and pays the cosine between all its params and the miner's.

    The update is a gradient step as long as a tenth of the params, far more than any real one.
    """

    name = "cosine of params"

    def __init__(self) -> None:
        self._epoch = -1

    def observe(self, submission: Submission, swarm: Swarm) -> float | None:
        if submission.claim.loss is None:
            return None
        if swarm.epoch != self._epoch:
            self._epoch, self._theta = swarm.epoch, swarm.theta
            self._replayed: dict[int, tuple[Tensor, float]] = {}  # by slot: params after our update, length of a step
        miner = submission.miner
        if miner.slot not in self._replayed:
            replayed = mean_gradient(miner.own_work(swarm))
            rate = RELATIVE_STEP * float(self._theta.norm() / replayed.norm())
            self._replayed[miner.slot] = self._theta - rate * replayed, rate
        ours, rate = self._replayed[miner.slot]
        return float(torch.cosine_similarity(ours, self._theta - rate * submission.claim.sent, dim=0))

    def scores(self, observed: Mapping[str, float | None]) -> dict[str, float]:
        return {hotkey: max(0.0, cosine or 0.0) for hotkey, cosine in observed.items()}


class SignOfGain(EarlierRule):
    """Does an update lower the loss on the miner's own data more than on random data? Pays an average of the sign.

    A validator looks at 8 sequences of each kind; the own ones come from a share of the data of which a round trains on
    19 %. The random ones are other sequences of the same unit, which favours this rule: the units of the small corpus
    differ more in style than a round's training moves their loss. The score is the mean over some validators.
    """

    name = "sign of gain"

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._averages: dict[str, Tensor] = {}  # of each validator
        self._epoch = -1

    def observe(self, submission: Submission, swarm: Swarm) -> float | None:
        if submission.claim.loss is None:
            return None
        if swarm.epoch != self._epoch:
            self._epoch, self._theta = swarm.epoch, swarm.theta
            self._looks: dict[int, Look] = {}
        slot = submission.miner.slot
        if slot not in self._looks:
            self._looks[slot] = self._look(swarm, slot)
        signs = self._signs(swarm, self._looks[slot], submission.claim.sent)
        hotkey = submission.miner.address
        before = self._averages.get(hotkey, torch.zeros(VALIDATORS))
        self._averages[hotkey] = (1 - EMA) * before + EMA * signs
        return float(self._averages[hotkey].clamp(min=0).mean())

    def scores(self, observed: Mapping[str, float | None]) -> dict[str, float]:
        return {hotkey: score or 0.0 for hotkey, score in observed.items()}

    def _signs(self, swarm: Swarm, look: "Look", sent: Tensor) -> Tensor:
        """Of each validator: +1 if the own data gain more, -1 otherwise."""
        length = float(sent.norm())
        if not length:
            return -torch.ones(VALIDATORS)
        updated = self._theta - sent * (GAIN_STEP * float(self._theta.norm()) / length)
        gains = look.losses - swarm.losses_at(updated, look.blocks)
        own, other = gains[look.own].mean(1), gains[look.other].mean(1)
        return torch.where(own > other, 1.0, -1.0)

    def _look(self, swarm: Swarm, slot: int) -> "Look":
        samples = swarm.economy.samples
        share = round(samples / TRAINED_SHARE)
        blocks = swarm.reader.batch(slot, START, swarm.epoch * samples, share + OTHER_BLOCKS)[0]["input_ids"]
        own = torch.randperm(share, generator=self._random)[:POOL]
        other = share + torch.randperm(OTHER_BLOCKS, generator=self._random)[:POOL]
        blocks = blocks[torch.cat([own, other])]
        picks = torch.stack([torch.randperm(POOL, generator=self._random)[:EVALUATED] for _ in range(2 * VALIDATORS)])
        return Look(blocks, swarm.losses_at(self._theta, blocks), picks[:VALIDATORS], POOL + picks[VALIDATORS:])


@dataclass(frozen=True)
class Look:
    """What gains in a slot are measured on: blocks (B, T), their losses (B,) before, and each validator's choice."""

    blocks: Tensor
    losses: Tensor
    own: Tensor
    other: Tensor


def earlier_rules(seed: int) -> Sequence[EarlierRule]:
    """All three, with nothing observed yet."""
    return DeviationOfLosses(), CosineOfParams(), SignOfGain(seed)
