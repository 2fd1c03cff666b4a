"""What others may learn of a validator's work while it happens."""

from collections.abc import Mapping, Sequence
from typing import Any

from hivetrain.scoring import TempoScore


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

    def weighed(self, status: str, miners: int) -> None:
        """A tempo's weights were tried, for so many miners; ``status`` says what became of them."""

    def scored(
        self,
        block: int,
        scores: Mapping[str, TempoScore],
        averages: Mapping[str, float],
        weights: Mapping[str, float],
        reasons: Mapping[str, str],
    ) -> None:
        """A tempo that ended in ``block`` was scored; ``reasons`` says why contributions went unpaid, by hotkey."""


class Watchers(ValidatorWatcher):
    """Some watchers as one.

    Args:
        watchers: told in this order; duck-typed, what one lacks it is not told.
    """

    def __init__(self, watchers: Sequence[Any]) -> None:
        self._watchers = watchers

    def polled(self, *told: Any) -> None:
        self._tell("polled", told)

    def failed(self, *told: Any) -> None:
        self._tell("failed", told)

    def audited(self, *told: Any) -> None:
        self._tell("audited", told)

    def judged(self, *told: Any) -> None:
        self._tell("judged", told)

    def weighed(self, *told: Any) -> None:
        self._tell("weighed", told)

    def scored(self, *told: Any) -> None:
        self._tell("scored", told)

    def _tell(self, what: str, told: tuple[Any, ...]) -> None:
        for watcher in self._watchers:
            if hasattr(watcher, what):
                getattr(watcher, what)(*told)
