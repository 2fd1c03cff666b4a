"""Combinations that a swarm cannot train with, refused before anything touches the network."""

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler

from hivetrain.averaging.collaboration import POLICIES
from hivetrain.averaging.compression import make_compressor
from hivetrain.averaging.direct.options import TRANSPORTS
from hivetrain.averaging.rules import RULES


def check_arguments(
    run_id: str,
    on_failed_round: str,
    compression: str,
    matchmaking_time: float,
    averaging_timeout: float,
    transport: str,
    reduction: str,
    max_upload_mbit_s: float | None,
    direct_port: int,
    **at_least_one: float | None,
) -> None:
    """Raises MisconfigurationException for arguments of the strategy that are out of range."""
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise MisconfigurationException(f"{name} must be at least 1, got {value}")
    if not run_id or "." in run_id:
        raise MisconfigurationException(f"run_id must be a non-empty name without dots, got {run_id!r}")
    if on_failed_round not in POLICIES:
        raise MisconfigurationException(f"on_failed_round must be one of {POLICIES}, got {on_failed_round!r}")
    if transport not in TRANSPORTS:
        raise MisconfigurationException(f"transport must be one of {TRANSPORTS}, got {transport!r}")
    if reduction not in RULES:
        raise MisconfigurationException(f"reduction must be one of {tuple(RULES)}, got {reduction!r}")
    if max_upload_mbit_s is not None and max_upload_mbit_s <= 0:
        raise MisconfigurationException(f"max_upload_mbit_s must be positive, got {max_upload_mbit_s}")
    if not 0 <= direct_port < 2**16:
        raise MisconfigurationException(f"direct_port must be a TCP port or 0, got {direct_port}")
    if not 0 < matchmaking_time < averaging_timeout:
        raise MisconfigurationException("matchmaking_time must be positive and less than averaging_timeout")
    try:
        make_compressor(compression, shapes=())
    except ValueError as error:
        raise MisconfigurationException(str(error)) from None


def check_trainer(trainer: Trainer) -> None:
    """Raises MisconfigurationException for Trainer options and callbacks that contradict swarm training."""
    accumulates = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if trainer.accumulate_grad_batches != 1 or accumulates:
        raise MisconfigurationException(
            "accumulate_grad_batches must be 1: the swarm accumulates. Raise target_batch_size instead."
        )
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "StochasticWeightAveraging replaces the learning-rate schedule on this peer alone. Remove it, or use "
            "EMAWeightAveraging, which leaves training as it is."
        )


def check_optimization(
    module: LightningModule, optimizers: Sequence[torch.optim.Optimizer], configs: Sequence[LRSchedulerConfig]
) -> None:
    """Raises MisconfigurationException unless there is one optimizer that Lightning steps, and schedules by count."""
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"HivemindStrategy averages one optimizer's gradients, got {len(optimizers)}. "
            "Put all params into one optimizer, with param groups where their options differ."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(module).__name__} optimizes by hand (automatic_optimization = False), but the swarm decides when "
            "to step. Return the loss from training_step and leave the rest to the strategy."
        )
    if isinstance(optimizers[0], torch.optim.LBFGS):
        raise MisconfigurationException(
            "LBFGS evaluates the loss several times a step, which a swarm cannot. Use an optimizer that steps on a "
            "given gradient, such as AdamW."
        )
    if any(config.reduce_on_plateau for config in configs):
        raise MisconfigurationException(
            "ReduceLROnPlateau follows a local metric, so peers' learning rates would differ. "
            "Use a scheduler that depends on the step count only."
        )
    for config in configs:
        if config.frequency != 1:
            raise MisconfigurationException(
                f"a scheduler's frequency must be 1, got {config.frequency}: it steps once per swarm epoch. "
                "Stretch the schedule itself instead."
            )
        if not isinstance(config.scheduler, LRScheduler):
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} is no torch.optim.lr_scheduler.LRScheduler. Wrap it in LambdaLR."
            )
