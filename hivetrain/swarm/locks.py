"""Frees the locks that a killed DHT process took with it.

The surprising fact: all processes that hivemind forks share the semaphores of ``MPFuture`` with the program. One that
is killed between taking and releasing such a semaphore leaves it taken, and every DHT process started later by the same
program waits for it in vain, without a word.
"""

import logging
from typing import Any

from hivemind.utils.mpfuture import MPFuture, SharedBytes

logger = logging.getLogger(__name__)

MAX_HELD_S = 3.0  # a living process holds one for the writing of one small message


def free_abandoned_locks() -> None:
    """Release each of hivemind's shared locks that stays taken for ``MAX_HELD_S`` seconds."""
    for name, lock in _locks().items():
        if not lock.acquire(timeout=MAX_HELD_S):
            logger.warning("freeing hivemind's %s: a process that ended by force seems to have held it", name)
        lock.release()


def _locks() -> dict[str, Any]:
    return {
        "update lock": MPFuture._update_lock,
        "initialization lock": MPFuture._initialization_lock,
        "shared memory lock": SharedBytes._lock,
    }
