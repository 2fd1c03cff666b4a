"""A copy of the run's model that makes every global update itself without having contributed to it.

An update fetched from a peer is applied exactly as the peers do it. Whether it was the true one is known afterwards, by
the digest of the params; until then nothing is reported, and what was false is undone.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import LRSchedulerConfig

from hivetrain.averaging.accumulator import GradientAccumulator
from hivetrain.averaging.group import DIGEST_BYTES
from hivetrain.averaging.observer import SwarmObserver
from hivetrain.averaging.progress import SwarmView
from hivetrain.averaging.state import Snapshot, StateError, load_snapshot, params_digest, take_snapshot
from hivetrain.averaging.updates import Followed, Update
from hivetrain.errors import UserError
from hivetrain.strategies.checks import check_optimization
from hivetrain.strategies.clipping import clip_by_norm
from hivetrain.strategies.epoch_files import EpochFiles
from hivetrain.strategies.schedules import EpochSchedules, SchedulerFn, make_schedulers

logger = logging.getLogger(__name__)

_FORSAKEN_S = 60.0


@dataclass(frozen=True)
class Optimization:
    """A module's optimizer and schedulers, built outside a Trainer, and how its gradients are clipped."""

    optimizer: torch.optim.Optimizer
    schedules: EpochSchedules
    gradient_clip_val: float | None

    @classmethod
    def of(
        cls, module: LightningModule, gradient_clip_val: float | None, scheduler_fn: SchedulerFn | None
    ) -> "Optimization":
        """Asks the module.

        Raises:
            UserError: ``configure_optimizers`` returns something else than one optimizer with at most one scheduler.
        """
        configured: Any = module.configure_optimizers()
        if isinstance(configured, torch.optim.Optimizer):
            configured = {"optimizer": configured}
        if not isinstance(configured, dict) or not isinstance(configured.get("optimizer"), torch.optim.Optimizer):
            raise UserError("a model that is to be followed returns one optimizer, or a dict with one, from "
                            "configure_optimizers")  # fmt: skip
        optimizer, entry = configured["optimizer"], configured.get("lr_scheduler")
        entry = entry["scheduler"] if isinstance(entry, dict) else entry
        configs = make_schedulers([LRSchedulerConfig(entry)] if entry is not None else [], scheduler_fn, optimizer)
        check_optimization(module, [optimizer], configs)
        return cls(optimizer, EpochSchedules(configs, optimizer, module), gradient_clip_val)


class Follower:
    """Holds the run's params at its current swarm epoch, and on disk those of the last epochs.

    Args:
        module: the run's model, on the device where updates are to be applied.
        optimization: its optimizer, schedulers and clipping, as the peers have them.
        observer: an open view of the run.
        files: where the epochs are kept.
        clock: monotonic seconds.
    """

    def __init__(
        self, module: LightningModule, optimization: Optimization, observer: SwarmObserver, files: EpochFiles,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._module, self._optimization, self._observer = module, optimization, observer
        self._files, self._clock = files, clock
        self._optimizer = optimization.optimizer
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        self._gradient = GradientAccumulator(params)
        self.epoch = 0
        self.digest = ""  # none yet
        self.num_peers = 0
        self.resynchronised = 0
        self._ahead_since: float | None = None
        self._recalled: list[Followed] = []

    @property
    def trainable_params(self) -> list[torch.nn.Parameter]:
        """The params whose gradients are averaged, in the order in which they are."""
        return self._gradient.params

    def recall(self) -> None:
        """Takes up what an earlier run left on disk; :meth:`advance` reports those epochs again."""
        self._files.discard()
        snapshot = self._files.latest()
        if snapshot is None:
            return
        self._take_over(snapshot)
        if params_digest(self._module) != snapshot.digest:
            raise UserError(f"{self._files.directory} holds params of another model, or is damaged: remove it")
        self._recalled = self._files.updates()
        logger.info("resumed at swarm epoch %d", self.epoch)

    def advance(self) -> list[Followed]:
        """Goes as far as the run has; returns the epochs that have ended since, in order, each once."""
        followed, self._recalled = self._recalled, []
        view = self._observer.view()
        self.num_peers = len(view.peers)
        if not view.peers or not self._should_move(view):
            return followed
        if self.digest and view.epoch > self.epoch:
            for _ in range(2):  # the second time from other peers, as far as there are
                done = self._apply_updates(view)
                if done is not None:
                    return followed + done
        return followed + self._resynchronise(view)

    def params(self, epoch: int) -> tuple[str, dict[str, torch.Tensor]] | None:
        """The params of an epoch, their digest and they by name, on CPU; None if they are not kept (any more)."""
        return self._files.params(epoch)

    def _should_move(self, view: SwarmView) -> bool:
        if not self.digest:
            return True
        if view.epoch >= self.epoch:
            self._ahead_since = None
            return view.epoch > self.epoch or not self._agrees(view)
        self._ahead_since = self._ahead_since or self._clock()
        return self._clock() - self._ahead_since > _FORSAKEN_S  # the run has gone back to an earlier state

    def _agrees(self, view: SwarmView) -> bool:
        return not view.digest or bytes.fromhex(self.digest)[:DIGEST_BYTES] == view.digest

    def _apply_updates(self, view: SwarmView) -> list[Followed] | None:
        """Applies all updates up to the run's epoch; None, with the state as before, if that does not lead there."""
        done = []
        try:
            while self.epoch < view.epoch:
                followed = Followed(self.epoch, self.digest, self._observer.fetch_update(self.epoch, view))
                self._step(followed.update)
                done.append(followed)
                self._files.stage(take_snapshot(self._module, self._optimizer, self.epoch, self.digest), followed)
        except (StateError, TimeoutError) as error:
            logger.warning("cannot follow the update of swarm epoch %d: %s", self.epoch, error)
        if self.epoch == view.epoch and self._agrees(view):
            self._files.settle()
            return done
        if self.epoch == view.epoch:
            logger.warning("the updates up to swarm epoch %d do not lead to the peers' params", view.epoch)
        self._files.discard()
        start = self._files.latest()
        assert start is not None, "every epoch reached is on disk"
        self._take_over(start)
        return None

    def _step(self, update: Update | None) -> None:
        assert update is not None
        assert update.average is not None
        self._gradient.put(update.average.clone())  # clipping changes it in place
        if self._optimization.gradient_clip_val:
            clip_by_norm(self.trainable_params, self._optimization.gradient_clip_val)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.epoch += 1
        self._optimization.schedules.follow(self.epoch)
        self.digest = params_digest(self._module)

    def _resynchronise(self, view: SwarmView) -> list[Followed]:
        """Takes over the peers' state; the epochs in between are lost.

        Where the machine's arithmetic is not the peers', that is the way on at every epoch. None is lost then: the
        params are the peers' own, and only the averaged gradient stays unchecked.
        """
        try:
            snapshot = self._observer.download(view, self._module, self._optimizer)
        except (StateError, TimeoutError) as error:
            logger.warning("cannot get the run's state: %s", error)
            return []
        ended = [self._seen(epoch, view) for epoch in range(self.epoch, snapshot.epoch)] if self.digest else []
        if self.digest:
            self.resynchronised += 1
            lost = sum(entry.update is None for entry in ended)
            logger.warning(
                "took over the peers' state of swarm epoch %d from %d; %d epochs are lost",
                snapshot.epoch, self.epoch, lost,
            )  # fmt: skip
        self._take_over(snapshot)
        self._files.stage(snapshot, ended[-1] if len(ended) == 1 else None)
        self._files.settle()
        return ended

    def _seen(self, epoch: int, view: SwarmView) -> Followed:
        """An epoch whose update was not applied. Of the current one the params are known all the same."""
        if epoch != self.epoch:
            return Followed(epoch, "", None)
        try:
            return Followed(epoch, self.digest, self._observer.header(epoch, view))
        except (StateError, TimeoutError):
            return Followed(epoch, self.digest, None)

    def _take_over(self, snapshot: Snapshot) -> None:
        load_snapshot(snapshot, self._module, self._optimizer)
        self.epoch, self.digest, self._ahead_since = snapshot.epoch, snapshot.digest, None
        self._optimization.schedules.follow(self.epoch)
