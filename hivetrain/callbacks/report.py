"""What one miner did, as JSON lines that another program may follow while it runs.

Surprising fact: a microbatch belongs to the swarm epoch that was current when it began, because the last one of an
epoch has already moved the counter when it ends.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hivetrain.callbacks.swarm_view import swarm_epoch, swarm_of
from hivetrain.errors import UserError

logger = logging.getLogger(__name__)


class MinerReport(Callback):
    """Writes one JSON object a line: ``start``, one ``epoch`` for each swarm epoch, ``end``.

    Every line has ``event``, ``swarm_epoch`` and ``wall_s`` (seconds since the start). ``start`` adds ``peer_id``,
    ``visible_maddrs`` and ``heldout_loss``. ``epoch`` is about the epoch it names and adds ``loss`` (mean over this
    miner's microbatches, null if it had none), ``samples``, ``tokens`` (both of this miner alone), ``peers`` and, of
    the last averaging round, ``group_size``, ``exchange_s``, ``matchmaking_s`` and ``outcome``. ``end`` adds
    ``samples``, ``tokens``, ``params_digest``, ``heldout_loss`` and ``peer_id``. What there is not (no swarm, no
    validation data) is null. A run that fails or is interrupted has no ``end``. A line that cannot be written, such as
    to a full disk, is missing as a whole; the first one is logged, and the training goes on.

    Args:
        path: The file; one of an earlier run is replaced.
        val_batches: Batches of the validation data for ``heldout_loss``; 0 leaves it out.
    """

    def __init__(self, path: str, val_batches: int = 8, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = Path(path)
        self.val_batches = val_batches
        self._clock = clock
        self._file: FileIO | None = None
        self._lost = False
        self._losses: list[Tensor] = []
        self._epoch: int | None = None
        self._samples = self._tokens = self._all_samples = self._all_tokens = 0
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the file before anything is spent on training."""
        if stage != "fit":
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write the report {self.path}: {error.strerror}") from error
        self._began = self._clock()
        self._epoch = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``start``, once; a strategy restores the swarm epoch only after ``on_train_start``."""
        if self._epoch is not None:
            return
        swarm = swarm_of(trainer)
        self._epoch = swarm_epoch(trainer)
        self._write(
            "start",
            self._epoch,
            peer_id=swarm.peer_id if swarm else None,
            visible_maddrs=[str(address) for address in swarm.visible_maddrs] if swarm else [],
            heldout_loss=held_out_loss(trainer, pl_module, self.val_batches),
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Close the epoch if it moved between two microbatches."""
        self._close_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the microbatch and close the epoch if this was its last."""
        self._losses.append(outputs["loss"].detach())
        self._samples += batch["input_ids"].shape[0]
        self._tokens += batch["input_ids"].numel()
        self._close_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``end``."""
        swarm = swarm_of(trainer)
        self._write(
            "end",
            swarm_epoch(trainer),
            samples=self._all_samples + self._samples,
            tokens=self._all_tokens + self._tokens,
            params_digest=swarm.params_digest() if swarm else None,
            heldout_loss=held_out_loss(trainer, pl_module, self.val_batches),
            peer_id=swarm.peer_id if swarm else None,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file, also after a failure."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _close_epoch(self, trainer: Trainer) -> None:
        epoch = swarm_epoch(trainer)
        assert self._epoch is not None
        if epoch == self._epoch:
            return
        swarm = swarm_of(trainer)
        last_round = swarm.rounds[-1] if swarm and swarm.rounds else None
        self._write(
            "epoch",
            self._epoch,
            loss=torch.stack(self._losses).mean().item() if self._losses else None,
            samples=self._samples,
            tokens=self._tokens,
            peers=swarm.num_peers if swarm else None,
            group_size=getattr(last_round, "group_size", None),
            exchange_s=getattr(last_round, "exchange_s", None),
            matchmaking_s=getattr(last_round, "matchmaking_s", None),
            outcome=None if last_round is None else str(last_round.outcome),
        )
        self._all_samples += self._samples
        self._all_tokens += self._tokens
        self._losses, self._samples, self._tokens, self._epoch = [], 0, 0, epoch

    def _write(self, event: str, epoch: int, **values: Any) -> None:
        assert self._file is not None
        record = {"event": event, "swarm_epoch": epoch, "wall_s": round(self._clock() - self._began, 3), **values}
        line = json.dumps(record) + "\n"  # NaN stays NaN: a loss that diverged is to be seen
        try:
            _append(self._file, line.encode())
        except OSError as error:
            if not self._lost:
                said = "the report %s lacks %r of swarm epoch %d and what else cannot be written: %s. Training goes on"
                logger.warning(said, self.path, event, epoch, error.strerror)
            self._lost = True


def _append(file: FileIO, line: bytes) -> None:
    """Add the whole line or nothing: readers of the file parse every line that has an end."""
    begin = file.tell() if file.seekable() else None  # a pipe is not
    rest = line
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        if begin is not None:
            file.seek(begin)
            with suppress(OSError):
                file.truncate()
        raise


@torch.no_grad()
def held_out_loss(trainer: Trainer, pl_module: Any, batches: int) -> float | None:
    """Mean loss over the first batches of the data module's validation data, or None if there is none."""
    data = getattr(trainer, "datamodule", None)
    loader = data.val_dataloader() if data is not None and batches > 0 else None
    if not loader:
        return None
    was_training = pl_module.training
    pl_module.eval()
    losses: list[Tensor] = []
    weights: list[int] = []
    with trainer.precision_plugin.forward_context():
        for batch in islice(loader, batches):
            losses.append(pl_module.loss(trainer.strategy.batch_to_device(batch)))
            weights.append(batch["input_ids"].shape[0])
    pl_module.train(was_training)
    if not losses:
        return None
    share = torch.tensor(weights, dtype=torch.float32, device=losses[0].device) / sum(weights)
    return float((torch.stack(losses).float() * share).sum())
