"""A limit on this peer's upload, shared by all its links: people share their line with others."""

import threading
import time
from collections.abc import Callable

CHUNK_BYTES = 2**15
_BURST_S = 0.05


class TokenBucket:
    """Says how long to wait before the next bytes may leave.

    Args:
        bytes_per_s: the limit.
        clock: monotonic seconds.
    """

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_s, self._clock = bytes_per_s, clock
        self._lock = threading.Lock()
        self._free_at = clock()

    def reserve(self, size_bytes: int) -> float:
        """Takes ``size_bytes`` of the line's time; returns the seconds to wait before they are sent.

        Time that nobody used is lost but for a twentieth of a second, so that no burst follows a pause.
        """
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - _BURST_S)
            self._free_at = begin + size_bytes / self.bytes_per_s
            return max(0.0, begin - now)
