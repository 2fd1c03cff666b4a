"""A Weights & Biases logger for miners that says nothing about them but their numbers.

Surprising fact: wandb by itself records the command line, host, account and a copy of the terminal's output, in which a
miner's addresses stand; Lightning's logger has no option against it that would not put paths of keys into the saved
configuration.
"""

from lightning.pytorch.loggers import WandbLogger

from hivetrain.errors import UserError


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
