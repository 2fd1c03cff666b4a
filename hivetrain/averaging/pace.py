"""How fast this peer works, and whether the swarm spends its time on work or on finding groups."""

import logging
import time
from collections.abc import Callable

from hivetrain.averaging.report import Outcome, RoundReport

logger = logging.getLogger(__name__)

_MEMORY = 0.7  # share of the old estimate in the running mean of samples per second
_SHORT_EPOCH = 1.5  # gathering a batch should take this many times as long as finding a group


class Pace:
    """Measures samples per second and the time between updates.

    Args:
        target_batch_size: samples per global update.
        clock: monotonic seconds.
    """

    def __init__(self, target_batch_size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._target, self._clock = target_batch_size, clock
        self.samples_per_s = 0.0
        self._warned = False
        self.start()

    def start(self) -> None:
        """Work begins now."""
        self._sampled_at = self._updated_at = self._clock()

    def add(self, samples: int) -> None:
        """A microbatch of ``samples`` samples is done."""
        now = self._clock()
        speed = samples / max(1e-6, now - self._sampled_at)
        old = self.samples_per_s
        self.samples_per_s = speed if old == 0 else _MEMORY * old + (1 - _MEMORY) * speed
        self._sampled_at = now

    def end_attempt(self, report: RoundReport, waited: bool) -> None:
        """An attempt at an update is over; warns, once, if epochs are too short for the time that groups take.

        Args:
            report: of the attempt.
            waited: whether nothing was gathered meanwhile.
        """
        now = self._clock()
        gathering_s = now - self._updated_at - report.matchmaking_s - report.exchange_s
        if report.committed:
            self._updated_at = now
        short = gathering_s < _SHORT_EPOCH * report.matchmaking_s
        if not (short and waited) or self._warned or report.outcome is not Outcome.AVERAGED:
            return
        self._warned = True
        enough = int(self._target * _SHORT_EPOCH * report.matchmaking_s / max(gathering_s, 1e-3)) + 1
        logger.warning(
            "gathering a batch takes %.1f s and finding a group %.1f s: raise target_batch_size to %d or more, or set "
            "overlap=True",
            gathering_s,
            report.matchmaking_s,
            enough,
        )
