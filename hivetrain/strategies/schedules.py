"""Learning-rate schedulers that follow the swarm epoch: ``scheduler(e)`` at epoch ``e``, wherever a peer comes from.

A peer may jump ahead (it joined late) and also back (it had gone its own way), and most schedulers cannot step back,
so the way back leads through their initial state.
"""

import copy
import sys
from collections.abc import Callable, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler

SchedulerFn = Callable[[torch.optim.Optimizer], LRScheduler]


def make_schedulers(
    configured: Sequence[LRSchedulerConfig], scheduler_fn: SchedulerFn | None, optimizer: torch.optim.Optimizer
) -> list[LRSchedulerConfig]:
    """The module's schedulers, or the one that ``scheduler_fn`` makes.

    Raises:
        MisconfigurationException: there are both.
    """
    if scheduler_fn is None:
        return list(configured)
    if configured:
        raise MisconfigurationException(
            "scheduler_fn and a scheduler of configure_optimizers exclude each other: remove one of them."
        )
    return [LRSchedulerConfig(scheduler_fn(optimizer))]


class EpochSchedules:
    """Steps all schedulers of one optimizer together. Create it before a checkpoint is restored.

    Args:
        configs: Lightning's, which this class marks so that no loop of Lightning's steps them.
        module: its hook ``lr_scheduler_step`` makes the steps.
    """

    def __init__(
        self, configs: Sequence[LRSchedulerConfig], optimizer: torch.optim.Optimizer, module: LightningModule
    ) -> None:
        self._schedulers = [config.scheduler for config in configs]
        self._optimizer, self._module = optimizer, module
        self._initial = copy.deepcopy([scheduler.state_dict() for scheduler in self._schedulers])
        self._initial_lrs = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
        self._epoch = 0
        for config in configs:
            # "step" is what LearningRateMonitor logs by; the frequency is one that no loop reaches.
            config.interval, config.frequency = "step", sys.maxsize

    def restored(self, epoch: int) -> None:
        """Takes note that a checkpoint has put the schedulers at ``epoch``."""
        self._epoch = epoch

    def rewind(self) -> None:
        """Puts schedulers and learning rates where they were at epoch 0."""
        for group, lr in zip(self._optimizer.param_groups, self._initial_lrs, strict=True):
            group["lr"] = copy.deepcopy(lr)
        for scheduler, state in zip(self._schedulers, self._initial, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))
        self._epoch = 0

    def follow(self, epoch: int) -> None:
        """Puts the learning rates where they belong at ``epoch``."""
        if epoch < self._epoch:
            self.rewind()
        for _ in range(epoch - self._epoch):
            for scheduler in self._schedulers:
                self._module.lr_scheduler_step(scheduler, None)
        self._epoch = epoch
