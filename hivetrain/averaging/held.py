"""The training state that a peer holds, and what of it others may have at any moment."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hivetrain.averaging.report import RoundReport
from hivetrain.averaging.state import Snapshot, load_snapshot, params_digest, take_snapshot
from hivetrain.averaging.updates import UpdateLog


class HeldState:
    """Module and optimizer at one swarm epoch, served to others as consistent copies.

    Args:
        module: the model.
        optimizer: the only optimizer.
        keep_updates_bytes: bytes of past averaged gradients to keep for those who follow the run.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, keep_updates_bytes: int) -> None:
        self._module, self._optimizer = module, optimizer
        self.epoch = 0
        self.digest = ""
        self.updates = UpdateLog(keep_updates_bytes)
        self._lock = threading.Lock()
        self._copy: Snapshot | None = None
        self._is_open = False

    def open(self) -> None:
        """Serves from now on."""
        self.digest = params_digest(self._module)
        self._is_open = True

    def close(self) -> None:
        """Serves no state any more."""
        with self._lock:
            self._is_open, self._copy = False, None

    def snapshot(self) -> Snapshot | None:
        """The state to serve to others, None while there is none; safe on any thread."""
        with self._lock:
            if self._is_open and self._copy is None:
                self._copy = take_snapshot(self._module, self._optimizer, self.epoch, self.digest)
            return self._copy

    def take_over(self, snapshot: Snapshot) -> None:
        """Makes another peer's state the own one."""
        with self._lock:
            load_snapshot(snapshot, self._module, self._optimizer)
            self._moved_to(snapshot.epoch, snapshot.digest)

    @contextmanager
    def step(self, report: RoundReport, average: torch.Tensor) -> Iterator[None]:
        """The body applies ``average``, which leads to the next epoch; nobody is served meanwhile."""
        self.updates.add(self.epoch, report.members, average)  # a copy: clipping will change the gradient
        with self._lock:
            yield
            self._moved_to(self.epoch + 1, params_digest(self._module))

    def _moved_to(self, epoch: int, digest: str) -> None:
        self.epoch, self.digest, self._copy = epoch, digest, None
