"""Replays and sketches: the only part of a validator that computes gradients."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import LightningModule

from hivetrain.contribution.audit import SUM_TOLERANCES, Audit, audit, check_sum
from hivetrain.contribution.record import Contribution, Position, open_reveal
from hivetrain.contribution.replay import Replayer, place_of
from hivetrain.contribution.sketch import Sketcher, sketch_bytes, sketch_seed, sketch_vector
from hivetrain.data.reader import SlotReader
from hivetrain.validator.state import OpenRecord


class Auditor:
    """Audits contributions and sketches averages of one run.

    Args:
        run_id: of the run.
        module: its model.
        params: the trainable ones, in the order in which their gradients are averaged.
        reader: of its data.
        compression: of its exchange; decides how well sums of sketches must agree.
        device: where to replay.
        precision: of the replays: ``32-true`` or ``bf16-mixed``; None: each miner's own.
        rows: sequences to compute at a time, as of :class:`Replayer`.
    """

    def __init__(
        self,
        run_id: str,
        module: LightningModule,
        params: Sequence[torch.nn.Parameter],
        reader: SlotReader,
        compression: str = "none",
        device: str = "cpu",
        precision: str | None = None,
        rows: int | None = None,
    ) -> None:
        self.run_id, self.reader = run_id, reader
        self.sum_tolerance = SUM_TOLERANCES.get(compression)
        self._replayer = Replayer(module, params, reader, device, precision, rows)
        self._sizes = [param.numel() for param in params]
        self._loaded = ""

    def audit(self, record: OpenRecord, params: Mapping[str, torch.Tensor]) -> Audit:
        """Replays the drawn leaves of a contribution on the params of its epoch.

        Raises:
            DataError: the data cannot be read now.
            torch.OutOfMemoryError: a replay does not fit.
        """
        work = record.contribution
        assert record.drawn is not None
        reveal = open_reveal(record.reveal) if record.reveal is not None else None
        if record.drawn and reveal is not None and self._loaded != work.params_digest:
            self._loaded = ""
            self._replayer.load(params)
            self._loaded = work.params_digest
        seed = sketch_seed(self.run_id, work.swarm_epoch, work.params_digest)
        return audit(work, reveal, record.drawn, seed, record.slot, self._replayer)

    def carry(self, slot: int, position: Position) -> Position:
        """The place of a block whose number may go on past the end of its unit. Raises DataError."""
        return Position(*self.reader.carry(slot, place_of(position)))

    def sketch(self, epoch: int, params_digest: str, average: torch.Tensor) -> bytes:
        """Sketch of an averaged gradient, as it stands in records."""
        sketcher = Sketcher(sketch_seed(self.run_id, epoch, params_digest), self._sizes, average.device)
        return sketch_bytes(sketcher.sketch_flat(average))

    def sum_error(self, sketch: bytes, members: Sequence[tuple[float, Contribution]]) -> float:
        """How far the sketch of a round's average is from what its members' records say, relative to it."""
        return check_sum(sketch_vector(sketch), members)
