"""What a miner keeps of its own microbatches from the first one until the reveal: one leaf each.

Surprising fact: the total is summed from the sketches as fp32 in order, so it can be recomputed from the leaves alone.
"""

import struct

import torch

from hivetrain.contribution import merkle
from hivetrain.contribution.record import (
    MAX_MICROBATCHES,
    Contribution,
    Leaf,
    Position,
    RecordError,
    Reveal,
    RevealedLeaf,
)
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import SKETCH_SIZE, sketch_bytes


class WorkLog:
    """The leaves of one contribution in the making. A copy keeps a committed one until its reveal."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything; a new contribution begins."""
        self._leaves: list[Leaf] = []
        self._first: Position | None = None
        self._last: Position | None = None
        self._begin = 0
        self._batch_size = 0
        self._total = torch.zeros(SKETCH_SIZE)

    def copy(self) -> "WorkLog":
        """The same leaves, which later additions to this log or a reset leave as they are."""
        other = WorkLog()
        other.__dict__.update(self.__dict__, _leaves=list(self._leaves), _total=self._total.clone())
        return other

    @property
    def microbatches(self) -> int:
        return len(self._leaves)

    @property
    def samples(self) -> int:
        """Blocks in all microbatches."""
        return len(self._leaves) * self._batch_size

    @property
    def span(self) -> int:
        """Blocks of the stream from the first microbatch to the end of the last."""
        return self._leaves[-1].offset + self._batch_size if self._leaves else 0

    @property
    def total(self) -> torch.Tensor:
        """Sum of the sketches, each times the batch size, (256,) fp32."""
        return self._total.clone()

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(self._leaves)

    def add(self, position: Position, consumed: int, batch_size: int, loss: float, sketch: torch.Tensor) -> None:
        """Appends a microbatch whose gradient was added to the contribution.

        Args:
            position: of its first block.
            consumed: blocks of the slot's stream before it, as the data module's cursor counts them.
            batch_size: its blocks.
            loss: mean loss; rounded to fp32.
            sketch: of its mean gradient, (256,).

        Raises:
            RecordError: the microbatch cannot be part of this contribution; the log is as before.
        """
        if self._leaves and batch_size != self._batch_size:
            raise RecordError(
                f"a microbatch of {batch_size} samples follows one of {self._batch_size}: a contribution has a single "
                "batch size, since its leaves are weighted alike; drop the incomplete batch"
            )
        if len(self._leaves) == MAX_MICROBATCHES:
            raise RecordError(f"a contribution has at most {MAX_MICROBATCHES} microbatches: take larger ones")
        begin = self._begin if self._leaves else consumed
        if self._last is not None and (position <= self._last or consumed - begin < self.span):
            raise RecordError("a microbatch must lie behind the one before it in the stream")
        leaf = Leaf(consumed - begin, _fp32(loss), sketch_bytes(sketch))
        self._begin, self._batch_size, self._last = begin, batch_size, position
        self._first = self._first or position
        self._leaves.append(leaf)
        self._total += batch_size * leaf.vector

    def contribution(
        self,
        *,
        run_id: str,
        hotkey: str,
        peer_id: str,
        swarm_epoch: int,
        params_digest: str,
        rules: AuditRules,
        block: int,
        precision: str,
    ) -> Contribution:
        """The record of all leaves so far, to be sealed before the exchange; arguments as of :class:`Contribution`.

        Raises:
            RecordError: there are no leaves, too many blocks were left out between them, or an argument is wrong.
        """
        if self._first is None or self._last is None:
            raise RecordError("nothing was added: there is no work to contribute")
        return Contribution(
            run_id=run_id,
            hotkey=hotkey,
            peer_id=peer_id,
            swarm_epoch=swarm_epoch,
            params_digest=params_digest,
            rules=rules.fingerprint,
            block=block,
            first=self._first,
            last=self._last,
            microbatches=len(self._leaves),
            batch_size=self._batch_size,
            samples=self.samples,
            span=self.span,
            total=sketch_bytes(self._total),
            root=merkle.root(self._hashes()),
            precision=precision,
        )

    def reveal(
        self, commitment: bytes, indices: tuple[int, ...], *, run_id: str, hotkey: str, swarm_epoch: int
    ) -> Reveal:
        """The drawn leaves with their paths.

        Args:
            commitment: of the sealed contribution.
            indices: of the leaves, as the beacon drew them.
            run_id: the run.
            hotkey: address of this miner.
            swarm_epoch: of the contribution.

        Raises:
            ValueError: there is no such leaf.
        """
        hashes = self._hashes()
        leaves = []
        for index in sorted(indices):
            path = merkle.path(hashes, index)
            leaves.append(RevealedLeaf(index, self._leaves[index], path))
        return Reveal(run_id, hotkey, swarm_epoch, commitment, tuple(leaves))

    def _hashes(self) -> list[bytes]:
        return [leaf.hash for leaf in self._leaves]


def _fp32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        raise RecordError(f"loss {value} is no fp32 number") from None
