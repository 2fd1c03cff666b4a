"""A miner of the simulation: one hotkey, and what it hands in each round.

Record, seal, commitment and reveal come from the code that real miners use.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from attacks_swarm import START, Microbatch, Position, Swarm
from torch import Tensor

from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import Contribution, commitment, seal
from hivetrain.keys import Hotkey

EXPIRES = 4e9  # the simulation has no clock
Change = Callable[[Contribution], Contribution]


@dataclass(frozen=True)
class Claim:
    """What a miner makes of one round.

    Attributes:
        microbatches: what it commits to; empty if it commits to nothing.
        sent: mean gradient that it gives to the all-reduce, (n,).
        loss: what it tells whoever asks for its loss; None if that cannot be read.
        change: what it changes in the record before it signs.
        garbage: bytes that it publishes instead of a record.
        blocks_late: how long after the others' commitments the record is seen.
        reveals: whether it answers when it is drawn.
    """

    microbatches: Sequence[Microbatch]
    sent: Tensor
    loss: float | None
    change: Change | None = None
    garbage: bytes = b""
    blocks_late: int = 1
    reveals: bool = True


@dataclass(frozen=True)
class Submission:
    """What the others get to see of a miner in one round.

    Attributes:
        miner: who.
        sealed: the record; b"" for none.
        block: at which the others of the round commit.
        seen_block: block at which validators first saw it.
        offered: samples that it told the group.
        claim: what is behind it.
        log: its microbatches, for the reveal.
    """

    miner: "Miner"
    sealed: bytes
    block: int
    seen_block: int
    offered: int
    claim: Claim
    log: WorkLog

    def reveal(self, drawn: tuple[int, ...], run_id: str, swarm_epoch: int) -> bytes | None:
        """The sealed reveal of the drawn leaves, if this miner gives one."""
        known = self.log.microbatches
        if not self.claim.reveals or not known:
            return None
        shown = tuple(sorted({index % known for index in drawn}))  # who claimed more than it has shows what it has
        hotkey = self.miner.hotkey
        record = self.log.reveal(
            commitment(self.sealed), shown, run_id=run_id, hotkey=hotkey.address, swarm_epoch=swarm_epoch
        )
        return seal(record, hotkey, EXPIRES)


Strategy = Callable[["Miner", Swarm], Claim]


class Miner:
    """One hotkey with a slot of data.

    Args:
        name: for people, and for its key.
        slot: its uid.
        strategy: makes its claim of each round.
    """

    def __init__(self, name: str, slot: int, strategy: Strategy) -> None:
        self.name, self.slot, self._strategy = name, slot, strategy
        digest = hashlib.sha256(name.encode()).digest()
        self.hotkey = Hotkey.from_seed(digest)
        self.peer_id = f"peer-{digest.hex()[:12]}"
        self.random = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
        self.kept: list[Microbatch] = []
        self.first_sealed = b""
        self.consumed = 0

    @property
    def address(self) -> str:
        return self.hotkey.address

    def submit(self, swarm: Swarm, block: int) -> Submission:
        """Works, or pretends to; ``block`` is the chain's block at the commitment."""
        claim = self._strategy(self, swarm)
        log = WorkLog()
        for done in claim.microbatches:
            log.add(done.position, done.consumed, swarm.economy.batch_size, done.loss, done.sketch)
        if claim.garbage or not log.microbatches:
            return Submission(self, claim.garbage, block, block + 1, swarm.economy.samples, claim, log)
        record = log.contribution(
            run_id=swarm.economy.run_id, hotkey=self.address, peer_id=self.peer_id, swarm_epoch=swarm.epoch,
            params_digest=swarm.digest, rules=swarm.economy.rules, block=block, precision="32-true",
        )  # fmt: skip
        record = claim.change(record) if claim.change else record
        sealed = seal(record, self.hotkey, EXPIRES)
        self.first_sealed = self.first_sealed or sealed
        return Submission(self, sealed, block, block + claim.blocks_late, record.samples, claim, log)

    def own_work(self, swarm: Swarm, microbatches: int | None = None) -> list[Microbatch]:
        """This round's microbatches of the own slot, computed honestly."""
        count = microbatches or swarm.economy.microbatches
        return swarm.work(self.slot, swarm.epoch * count * swarm.economy.batch_size, count)

    def invented(self, swarm: Swarm) -> list[Microbatch]:
        """Random sketches of plausible length at the right places of the data, and one random gradient."""
        seen = swarm.microbatch(0, swarm.epoch * swarm.economy.samples)
        gradient = self._random_like(seen.gradient)
        return [
            Microbatch(position, consumed, usual_loss(swarm), gradient, self._random_like(seen.sketch))
            for position, consumed in self.own_places(swarm)
        ]

    def own_places(self, swarm: Swarm) -> list[tuple[Position, int]]:
        """Where this round's microbatches of the own slot lie."""
        return self.places(swarm, swarm.epoch * swarm.economy.samples, swarm.economy.microbatches)

    def places(self, swarm: Swarm, consumed: int, microbatches: int) -> list[tuple[Position, int]]:
        """Where so many microbatches of the own slot lie: position, and blocks of the stream before it."""
        starts = range(consumed, consumed + microbatches * swarm.economy.batch_size, swarm.economy.batch_size)
        return [(Position(*swarm.reader.position_at(self.slot, START, start)), start) for start in starts]

    def _random_like(self, vector: Tensor) -> Tensor:
        """Of the same length in some direction."""
        drawn = torch.randn(vector.shape, generator=self.random)
        return drawn * (vector.norm() / drawn.norm())


def mean_gradient(done: Sequence[Microbatch]) -> Tensor:
    """Mean of the microbatches' gradients, (n,)."""
    return torch.stack([each.gradient for each in done]).mean(0)


def mean_loss(done: Sequence[Microbatch]) -> float:
    """Mean of the microbatches' losses."""
    return sum(each.loss for each in done) / len(done)


def usual_loss(swarm: Swarm) -> float:
    """A loss that nobody doubts: the median of what the honest miners, in slots 0 and up, told before."""
    economy = swarm.economy
    begin = swarm.epoch * economy.samples
    return median(mean_loss(swarm.work(slot, begin, economy.microbatches)) for slot in range(economy.honest))
