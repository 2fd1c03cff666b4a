"""Checkpoints every few swarm epochs and at the end.

Surprising fact: Lightning's own save goes through a file in the system's temporary directory, so across file systems
its last move is a copy that a crash can cut short. Here a checkpoint is complete and on the disk before it gets its
name.
"""

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from hivetrain.callbacks.swarm_view import swarm_epoch
from hivetrain.errors import UserError

LAST = "last.ckpt"
UNFINISHED = ".unfinished"


class SwarmCheckpoint(Checkpoint):
    """Writes ``epoch-00000012.ckpt`` and points ``last.ckpt`` at the newest; resume with ``--ckpt_path``.

    Args:
        dirpath: Directory of the checkpoints; each miner needs its own.
        every_n_epochs: Swarm epochs from one checkpoint to the next.
        keep: How many of the newest to keep.
        save_at_end: Also write one when training ends by itself.
    """

    def __init__(
        self, dirpath: str = "checkpoints", every_n_epochs: int = 10, keep: int = 2, save_at_end: bool = True
    ) -> None:
        if every_n_epochs < 1 or keep < 1:
            raise UserError("checkpoint.every_n_epochs and checkpoint.keep must be at least 1")
        self.dirpath = Path(dirpath)
        self.every_n_epochs = every_n_epochs
        self.keep = keep
        self.save_at_end = save_at_end
        self._saved_epoch: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the directory and remove what an interrupted save left behind."""
        if stage != "fit":
            return
        self._saved_epoch = None
        try:
            self.dirpath.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.dirpath}: {error.strerror}") from error
        for path in self.dirpath.glob(f"*{UNFINISHED}"):
            path.unlink()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the swarm epoch at which this run begins; a strategy restores it after ``on_train_start``."""
        if self._saved_epoch is None:
            self._saved_epoch = swarm_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a multiple of ``every_n_epochs`` was reached or passed."""
        assert self._saved_epoch is not None
        if swarm_epoch(trainer) // self.every_n_epochs > self._saved_epoch // self.every_n_epochs:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state."""
        if self.save_at_end and swarm_epoch(trainer) != self._saved_epoch:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint of the present state and return its path."""
        epoch = swarm_epoch(trainer)
        path = self.dirpath / f"epoch-{epoch:08d}.ckpt"
        unfinished = path.with_suffix(UNFINISHED)
        trainer.save_checkpoint(unfinished, weights_only=False)  # with the optimizer's state
        self._saved_epoch = epoch
        if trainer.is_global_zero:
            _sync(unfinished)
            unfinished.replace(path)
            link = self.dirpath / f"{LAST}{UNFINISHED}"
            link.symlink_to(path.name)
            link.replace(self.dirpath / LAST)
            _sync(self.dirpath)
            for old in sorted(self.dirpath.glob("epoch-*.ckpt"), key=lambda old: old.stat().st_mtime_ns)[: -self.keep]:
                if old != path:
                    old.unlink()
        return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
