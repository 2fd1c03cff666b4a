"""Computes a miner's microbatch again, as its training step did.

Surprising fact: the arithmetic is Lightning's own. Loss, autocast and the conversion of inputs go through the same
plugin as in the miner's Trainer, so there is no second implementation of a training step that could drift from it.
"""

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from hivetrain.contribution.record import Contribution, Position
from hivetrain.contribution.sketch import Sketcher
from hivetrain.data.reader import Place, SlotReader

logger = logging.getLogger(__name__)

# By the precision in which a miner trains, that in which its work is replayed by default.
REPLAYED_IN = {"32-true": "32-true", "16-mixed": "32-true", "bf16-mixed": "bf16-mixed"}
REPLAY_PRECISIONS = tuple(sorted(set(REPLAYED_IN.values())))


class PrecisionError(ValueError):
    """Nothing can be replayed in this precision."""


@dataclass(frozen=True)
class Replayed:
    """One microbatch, computed again.

    Attributes:
        loss: mean loss.
        sketch: of the mean gradient, (256,) fp32 on CPU.
        place: (data_pass, window, place, block) of its first block.
        precision: in which it was computed.
    """

    loss: float
    sketch: torch.Tensor
    place: Place
    precision: str


class Replayer:
    """Computes microbatches as a miner's training step does, on a copy of the model.

    Neither the caller's module nor its gradients nor any random state changes.

    Args:
        module: the model of the run.
        params: its trainable params in the order in which the swarm concatenates gradients: the optimizer's.
        reader: of the run's data.
        device: where to compute; may be weaker than the miners'.
        precision: of all replays, one of ``REPLAY_PRECISIONS``, such as fp32 where bf16 is slow; what differs is then
            replayed in the miner's. None: always in the miner's, or fp32 for fp16.
        rows: sequences to compute at a time, half as many from then on where these do not fit into a GPU's memory.
            Only for losses that are a mean over sequences, as a language model's on full blocks is; None for others:
            always the whole microbatch.

    Raises:
        PrecisionError: ``precision`` is none of those.
    """

    def __init__(
        self,
        module: LightningModule,
        params: Sequence[torch.nn.Parameter],
        reader: SlotReader,
        device: str | torch.device = "cpu",
        precision: str | None = None,
        rows: int | None = None,
    ) -> None:
        self.reader = reader
        self.device = torch.device(device)
        self.precision = precision
        self.rows = rows
        if precision not in (None, *REPLAY_PRECISIONS):
            raise PrecisionError(f"cannot replay in precision {precision!r}: use {' or '.join(REPLAY_PRECISIONS)}")
        names = {param: name for name, param in module.named_parameters()}
        self._module = copy.deepcopy(module).to(self.device, torch.float32).train()
        own = dict(self._module.named_parameters())
        self._params = [own[names[param]] for param in params]
        self._sketcher: Sketcher | None = None
        self._seed = b""

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes over params (all of them) and buffers (those given), under the names that the module has for them.

        Raises:
            ValueError: a param is missing or a shape is another.
        """
        own: dict[str, torch.Tensor] = {**dict(self._module.named_buffers()), **dict(self._module.named_parameters())}
        missing = [name for name, _ in self._module.named_parameters() if name not in state]
        if missing:
            raise ValueError(f"param {missing[0]} is missing")
        for name, tensor in state.items():
            if name not in own or tensor.shape != own[name].shape:
                raise ValueError(f"{name}, {tuple(tensor.shape)}, is none of the model's tensors")
        for name, tensor in state.items():
            own[name].copy_(tensor)

    def replay(
        self, seed: bytes, slot: int, contribution: Contribution, offset: int, precision: str | None = None
    ) -> Replayed:
        """Computes the microbatch that begins ``offset`` blocks after the contribution's first.

        Args:
            seed: of the epoch's sketches.
            slot: whose data.
            contribution: says where the data begin and how large a microbatch is.
            offset: in blocks.
            precision: instead of the replayer's.

        Raises:
            PrecisionError: work in its precision cannot be replayed.
            AssignmentError: the data have no such place.
            DataError: a unit cannot be read, or the place is out of the reader's reach.
            torch.OutOfMemoryError: not even one sequence fits, or not the whole where ``rows`` is None.
        """
        batch, place = self.reader.batch(slot, place_of(contribution.first), offset, contribution.batch_size)
        precision = precision or self.precision_for(contribution.precision)
        loss, gradients = self.gradients(batch, precision)
        if self._sketcher is None or seed != self._seed:
            self._sketcher, self._seed = Sketcher(seed, [p.numel() for p in self._params], self.device), seed
        return Replayed(loss, self._sketcher.sketch(gradients), place, precision)

    def precision_for(self, miner: str) -> str:
        """In which precision work of a miner's is replayed here.

        Raises:
            PrecisionError: it cannot be replayed.
        """
        if miner not in REPLAYED_IN:
            raise PrecisionError(f"work in precision {miner!r} cannot be replayed: use {' or '.join(REPLAYED_IN)}")
        return self.precision or REPLAYED_IN[miner]

    def gradients(self, batch: Mapping[str, torch.Tensor], precision: str) -> tuple[float, list[torch.Tensor | None]]:
        """Mean loss and mean gradient of a batch on the loaded params, in the order of ``params``."""
        plugin = MixedPrecision("bf16-mixed", self.device.type) if precision == "bf16-mixed" else Precision()
        count = len(next(iter(batch.values())))
        while True:
            rows = min(self.rows or count, count)
            try:
                return self._gradients(batch, plugin, count, rows)
            except torch.OutOfMemoryError:
                if self.rows is None or rows == 1:
                    raise
            self.rows = rows // 2
            logger.warning("a replay of %d sequences at a time does not fit into memory: trying %d", rows, self.rows)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _gradients(
        self, batch: Mapping[str, torch.Tensor], plugin: Precision, count: int, rows: int
    ) -> tuple[float, list[torch.Tensor | None]]:
        """The same over pieces of so many rows."""
        total = 0.0
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda), torch.enable_grad():
                for start in range(0, count, rows):
                    part = {name: tensor[start : start + rows].to(self.device) for name, tensor in batch.items()}
                    share = len(next(iter(part.values()))) / count
                    loss = self._loss(part, plugin)
                    (loss if share == 1 else loss * share).backward()
                    total += share * loss.item()
            return total, [param.grad for param in self._params]
        finally:
            self._module.zero_grad(set_to_none=True)

    def _loss(self, batch: dict[str, torch.Tensor], plugin: Precision) -> torch.Tensor:
        with plugin.train_step_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer to log to
            out: Any = self._module.training_step(plugin.convert_input(batch), 0)
        loss = out["loss"] if isinstance(out, Mapping) else out
        assert isinstance(loss, torch.Tensor), "training_step returns the loss, as in training"
        return loss


def place_of(position: Position) -> Place:
    """A record's position as readers take it."""
    return position.data_pass, position.window, position.place, position.block
