"""End of training at a given swarm epoch."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hivetrain.callbacks.swarm_view import swarm_epoch
from hivetrain.errors import UserError


class StopAtSwarmEpoch(Callback):
    """Ends training once the swarm has made ``epochs`` global updates, whoever made them.

    Args:
        epochs: The swarm epoch at which to stop.
    """

    def __init__(self, epochs: int) -> None:
        if epochs < 1:
            raise UserError(f"stop.epochs must be at least 1, got {epochs}")
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once if the swarm is already there, by a checkpoint or by what peers sent."""
        self._stop_if_reached(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if this microbatch completed the last update."""
        self._stop_if_reached(trainer)

    def _stop_if_reached(self, trainer: Trainer) -> None:
        if swarm_epoch(trainer) >= self.epochs:
            trainer.should_stop = True
