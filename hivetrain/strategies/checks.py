"""Combinations that a swarm cannot train with, refused before anything touches the network."""

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.types import LRSchedulerConfig


def check_trainer(trainer: Trainer, precision: Precision) -> None:
    """Raises MisconfigurationException for Trainer options that contradict swarm training."""
    if trainer.accumulate_grad_batches != 1:
        raise MisconfigurationException(
            "accumulate_grad_batches must be 1: the swarm accumulates. Raise target_batch_size instead."
        )
    if isinstance(precision, MixedPrecision) and precision.scaler is not None:
        raise MisconfigurationException(
            "precision '16-mixed' scales losses differently on each peer, so gradients cannot be averaged. "
            "Use 'bf16-mixed' or '32-true'."
        )


def check_optimization(optimizers: Sequence[torch.optim.Optimizer], schedulers: Sequence[LRSchedulerConfig]) -> None:
    """Raises MisconfigurationException unless there is one optimizer and no scheduler that needs a metric."""
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"HivemindStrategy averages one optimizer's gradients, got {len(optimizers)}. "
            "Put all params into one optimizer, with param groups where their options differ."
        )
    if any(config.reduce_on_plateau for config in schedulers):
        raise MisconfigurationException(
            "ReduceLROnPlateau follows a local metric, so peers' learning rates would differ. "
            "Use a scheduler that depends on the step count only."
        )
