"""An average under way on the network loop, as the training thread holds it."""

import concurrent.futures
import threading
import time
from dataclasses import dataclass

import torch

from hivetrain.averaging.report import RoundReport


@dataclass(frozen=True)
class Attempt:
    """An average under way.

    Attributes:
        blank: what is known of its report already.
        gradient: what this peer brings, shape (n,).
        future: its result.
        deadline: monotonic time by which it has ended.
        grouped: set once a group has been found. From then on some member may have committed before this peer knows,
            so that the swarm's records run ahead of it: the vote decides, not they.
    """

    blank: RoundReport
    gradient: torch.Tensor
    future: "concurrent.futures.Future[tuple[RoundReport, torch.Tensor | None]]"
    deadline: float
    grouped: threading.Event

    @property
    def is_due(self) -> bool:
        """Whether it has ended, or should have."""
        return self.future.done() or time.monotonic() > self.deadline
