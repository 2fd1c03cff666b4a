"""Peers by whose fault, as this peer saw it itself, a round failed: left out for a while of the groups formed here.

Blame is never passed on: what others say of a peer is hearsay, and a lie costs nothing. So a peer can keep another out
of groups that it leads or asks to join, and out of no others.
"""

import time
from collections.abc import Callable, Collection, Iterable

_FACTOR_MAX = 8


class Blame:
    """Remembers faults.

    Args:
        for_s: how long a first fault counts; it doubles with each that follows before a round together succeeds.
        clock: monotonic seconds.
    """

    def __init__(self, for_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._for_s, self._clock = for_s, clock
        self._faults: dict[str, tuple[int, float]] = {}  # peer id -> (faults in a row, until)

    def add(self, peer_id: str) -> None:
        """A round failed by this peer's fault."""
        count, _ = self._faults.get(peer_id, (0, 0.0))
        until = self._clock() + self._for_s * min(_FACTOR_MAX, 2**count)
        self._faults[peer_id] = count + 1, until

    def clear(self, peer_ids: Iterable[str]) -> None:
        """A round with these peers succeeded."""
        for peer_id in peer_ids:
            self._faults.pop(peer_id, None)

    def left_out(self, live: Collection[str], quorum: int) -> frozenset[str]:
        """Which of the ``live`` peers to leave out of the next group; nobody, if the others were no quorum then."""
        now = self._clock()
        blamed = frozenset(peer_id for peer_id in live if self._faults.get(peer_id, (0, 0.0))[1] > now)
        return blamed if len(live) - len(blamed) >= quorum else frozenset()
