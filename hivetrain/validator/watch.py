"""What others may learn of a validator's work while it happens."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hivetrain.scoring import TempoScore  # with torch, which metrics do without


class ValidatorWatcher:
    """Follows a validator; subclasses override what they need. Called on the validator's thread, which waits."""

    def polled(self, block: int, swarm_epoch: int, open_contributions: int, seconds: float) -> None:
        """It has looked at chain and run once."""

    def failed(self, source: str) -> None:
        """``chain``, ``dht`` or ``data`` did not answer."""

    def audited(self, seconds: float) -> None:
        """It has replayed the drawn work of one contribution."""

    def judged(self, verdict: str, samples: int) -> None:
        """A contribution has its verdict."""

    def compared(self, outcome: str) -> None:
        """A round's average ``agrees`` or ``differs`` from what was committed to, or is ``unchecked`` for good."""

    def weighed(self, status: str, miners: int) -> None:
        """A tempo's weights were tried, for so many miners; ``status`` says what became of them."""

    def scored(
        self,
        block: int,
        scores: "Mapping[str, TempoScore]",
        averages: Mapping[str, float],
        weights: Mapping[str, float],
        reasons: Mapping[str, str],
    ) -> None:
        """A tempo that ended in ``block`` was scored; ``reasons`` says why contributions went unpaid, by hotkey."""


class Watchers(ValidatorWatcher):
    """Some watchers as one, told in their order."""

    def __init__(self, watchers: Sequence[ValidatorWatcher]) -> None:
        self._watchers = watchers

    def polled(self, block: int, swarm_epoch: int, open_contributions: int, seconds: float) -> None:
        for watcher in self._watchers:
            watcher.polled(block, swarm_epoch, open_contributions, seconds)

    def failed(self, source: str) -> None:
        for watcher in self._watchers:
            watcher.failed(source)

    def audited(self, seconds: float) -> None:
        for watcher in self._watchers:
            watcher.audited(seconds)

    def judged(self, verdict: str, samples: int) -> None:
        for watcher in self._watchers:
            watcher.judged(verdict, samples)

    def compared(self, outcome: str) -> None:
        for watcher in self._watchers:
            watcher.compared(outcome)

    def weighed(self, status: str, miners: int) -> None:
        for watcher in self._watchers:
            watcher.weighed(status, miners)

    def scored(
        self,
        block: int,
        scores: "Mapping[str, TempoScore]",
        averages: Mapping[str, float],
        weights: Mapping[str, float],
        reasons: Mapping[str, str],
    ) -> None:
        for watcher in self._watchers:
            watcher.scored(block, scores, averages, weights, reasons)
