"""Ties forked processes to their parent, so that killing one program leaves nothing running.

The surprising fact: a child cannot be told that its parent was killed with SIGKILL; it has to look. Linux's
parent-death signal is no substitute, because it fires when the *thread* that forked ends.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType

import psutil

PARENT_POLL_S = 0.5
KILL_WAIT_S = 1.0
SHM_MANAGER = "torch_shm_manager"


def end_with_parent(parent_pid: int) -> None:
    """Make this freshly forked process, with every process it starts, end when its parent ends or on SIGTERM.

    Call it first thing in the child, on its main thread. SIGINT is ignored from here on: a Ctrl-C reaches the whole
    terminal group, and the parent decides what it means.

    Args:
        parent_pid: process id of the parent, taken before the fork.
    """
    signal.set_wakeup_fd(-1)  # an event loop of the parent may have left one that leads back into the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_on_signal)
    threading.Thread(target=_watch_parent, args=(parent_pid,), name="parent-watchdog", daemon=True).start()


def list_descendants(pid: int) -> list[psutil.Process]:
    """All living processes below ``pid``, torch's shared memory manager excepted; empty when it is gone.

    The manager ends by itself when its last client has, and removes shared memory files that nobody else would.
    """
    with suppress(psutil.NoSuchProcess):
        return [child for child in psutil.Process(pid).children(recursive=True) if _name(child) != SHM_MANAGER]
    return []


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kill processes and wait up to a second for them; one whose id was given to another program is left alone."""
    targets = list(processes)
    for process in targets:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + KILL_WAIT_S
    while any(map(is_running, targets)) and time.monotonic() < deadline:
        time.sleep(0.01)


def is_running(process: psutil.Process) -> bool:
    """Whether the process lives; one that ended but was not reaped does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _name(process: psutil.Process) -> str | None:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return None


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(PARENT_POLL_S)
    _end_now(1)


def _end_on_signal(signum: int, _frame: FrameType | None) -> None:
    _end_now(128 + signum)


def _end_now(status: int) -> None:
    kill_all(list_descendants(os.getpid()))
    kill_all(list_descendants(os.getpid()))  # one that was being started during the first pass
    os._exit(status)
