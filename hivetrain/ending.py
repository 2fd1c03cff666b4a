"""The end of a program on SIGINT or SIGTERM: in order, and in time.

The surprising fact: the deadline is kept by a thread of its own, because Python runs signal handlers only between two
bytecodes of the main thread, and the backward pass of a large model on a CPU is one bytecode.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

ENDING_S = 8.0  # of the 10 that a program has to end after a signal


@contextmanager
def orderly_end() -> Iterator[list[int]]:
    """Turn the first SIGINT or SIGTERM into an exception in the main thread, and end the process if that takes long.

    Yields the signals received. Later ones are ignored, so that an impatient user does not interrupt the clean-up.
    """
    received: list[int] = []

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        if received:
            return
        received.append(signum)
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)

    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=_end_in_time, args=(reader,), name="orderly-end", daemon=True).start()
    previous = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield received
    finally:
        if not received:  # else both stay for the exit of the interpreter, which may hang too
            signal.set_wakeup_fd(previous_fd)
            writer.close()
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def exit_status(end: SystemExit | KeyboardInterrupt, received: list[int]) -> int:
    """What a program that ended so inside :func:`orderly_end` reports; ``received`` is what that yielded.

    Raises:
        KeyboardInterrupt: it was one, and came by no signal.
    """
    if received:
        return 128 + received[0]
    if isinstance(end, KeyboardInterrupt):
        raise end
    return end.code if isinstance(end.code, int) else 0


def _end_in_time(reader: socket.socket) -> None:
    """Wait for a signal's number on the socket; if the process still lives ENDING_S later, end it and its children."""
    while number := reader.recv(1):
        if number[0] in (signal.SIGINT, signal.SIGTERM):
            threading.Event().wait(ENDING_S)
            for child in psutil.Process().children(recursive=True):
                child.kill()
            os._exit(128 + number[0])
    reader.close()
