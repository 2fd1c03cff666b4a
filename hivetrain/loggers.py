"""Loggers for miners: one for Weights & Biases that says nothing about them but their numbers, and a table on the disk.

Surprising fact: wandb by itself records the command line, host, account and a copy of the terminal's output, in which a
miner's addresses stand; Lightning's logger has no option against it that would not put paths of keys into the saved
configuration.
"""

import logging
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, WandbLogger

from hivetrain.errors import UserError

logger = logging.getLogger(__name__)


def wandb_logger(
    project: str = "hivetrain",
    group: str | None = None,
    name: str | None = None,
    save_dir: str = "logs",
    offline: bool = False,
) -> WandbLogger:
    """A run of wandb; needs the extra ``wandb``.

    Args:
        project: of the run.
        group: what its miners have in common: their ``run_id``.
        name: of this miner in the group; None lets wandb choose.
        save_dir: directory for its files.
        offline: write files only; ``wandb sync`` sends them later.
    """
    try:
        from wandb import Settings
    except ImportError as error:
        raise UserError("wandb is not installed: pip install 'hivetrain[wandb]', or choose another logger") from error
    settings = Settings(host="miner", x_disable_meta=True, x_disable_machine_info=True, disable_git=True, console="off")
    if offline:
        settings.mode = "offline"
    return WandbLogger(name=name, save_dir=save_dir, project=project, group=group, settings=settings)


class MetricsTable(CSVLogger):
    """Lightning's CSV table. Where it cannot be written, such as to a full disk, it ends and the training goes on."""

    _ended = False

    def save(self) -> None:
        """Write the rows since the last call."""
        try:
            if not self._ended:
                super().save()
        except OSError as error:
            self._ended = True
            path = Path(self.experiment.metrics_file_path)
            logger.warning("the table %s ends here: %s. Training goes on", path, error.strerror)
            with suppress(OSError), path.open("rb+") as table:
                table.truncate(table.read().rfind(b"\n") + 1)  # a row may be there in part
        if self._ended:
            self.experiment.metrics.clear()
