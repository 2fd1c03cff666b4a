"""Checkpoints every few swarm epochs and at the end.

Surprising fact: Lightning's own save goes through a file in the system's temporary directory, so across file systems
its last move is a copy that a crash can cut short. Here a checkpoint is complete and on the disk before it gets its
name. A disk that is full does not end the training: the peers wait for nobody's disk.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from hivetrain.callbacks.checkpoint_file import UNFINISHED, WholeFileIO, sync_directory
from hivetrain.callbacks.swarm_view import swarm_epoch
from hivetrain.errors import UserError

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


class CheckpointError(UserError, OSError):
    """A checkpoint cannot be written; those written before are untouched."""


class SwarmCheckpoint(Checkpoint):
    """Writes ``epoch-00000012.ckpt`` and points ``last.ckpt`` at the newest; resume with ``--ckpt_path``.

    One that cannot be written is logged as an error and tried again ``every_n_epochs`` later; those written before
    stay. When the one at the end cannot be written, that is an error that ends the program.

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
        self._saved_epoch: int | None = None  # or tried to
        self._written_epoch: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the directory and remove what an interrupted save left behind."""
        if stage != "fit":
            return
        self._saved_epoch = None
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # a user's own choice is kept
            trainer.strategy.checkpoint_io = WholeFileIO()
        try:
            self.dirpath.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot keep checkpoints in {self.dirpath}: {error.strerror}") from error
        for path in (*self.dirpath.glob(f"*{UNFINISHED}"), *self.dirpath.glob(f".*{UNFINISHED}")):
            path.unlink(missing_ok=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the swarm epoch at which this run begins; a strategy restores it after ``on_train_start``."""
        if self._saved_epoch is None:
            self._saved_epoch = self._written_epoch = swarm_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a multiple of ``every_n_epochs`` was reached or passed."""
        assert self._saved_epoch is not None
        if swarm_epoch(trainer) // self.every_n_epochs > self._saved_epoch // self.every_n_epochs:
            self._saved_epoch = swarm_epoch(trainer)  # also when it fails: the next one is tried in its turn
            try:
                self.save(trainer)
            except CheckpointError as error:
                logger.error("%s; training goes on", error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state."""
        if self.save_at_end and swarm_epoch(trainer) != self._written_epoch:
            self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint of the present state and return its path.

        Raises:
            CheckpointError: It cannot be written; those written before are untouched.
        """
        epoch = swarm_epoch(trainer)
        path = self.dirpath / f"epoch-{epoch:08d}.ckpt"
        try:
            self._write(trainer, path)
        except OSError as error:
            with suppress(OSError):
                path.with_suffix(UNFINISHED).unlink()
            raise CheckpointError(self._why_not(error)) from error
        self._saved_epoch = self._written_epoch = epoch
        return path

    def _write(self, trainer: Trainer, path: Path) -> None:
        unfinished = path.with_suffix(UNFINISHED)
        trainer.save_checkpoint(unfinished, weights_only=False)  # with the optimizer's state
        if trainer.is_global_zero:
            unfinished.replace(path)
            link = self.dirpath / f"{LAST}{UNFINISHED}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self.dirpath / LAST)
            sync_directory(self.dirpath)
            for old in sorted(self.dirpath.glob("epoch-*.ckpt"), key=lambda old: old.stat().st_mtime_ns)[: -self.keep]:
                if old != path:
                    old.unlink()

    def _why_not(self, error: OSError) -> str:
        last = self.dirpath / LAST
        kept = f"the last good one is {last.resolve().name}" if last.exists() else "there is none yet"
        reason = error.strerror or str(error)
        return f"cannot write a checkpoint to {self.dirpath}: {reason}. Free some space there ({kept})"
