"""Deadlines around asynchronous clients: an event loop on a thread of its own, called from ordinary code.

Surprising fact: a cancelled coroutine may take its time to end, so the caller waits on a clock of its own and leaves
after the deadline plus half a second, whatever the loop is doing. Another: a forked child shares the parent's epoll
object, and closing an inherited connection there makes the parent deaf; a child starts anew and keeps the old one open.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar
from weakref import WeakSet

from hivetrain.chain.base import Code, LedgerError

T = TypeVar("T")

GRACE_S = 0.5
CLOSE_S = 1.0


class LoopThread:
    """Runs coroutines with a deadline; the thread starts with the first call and ends with :meth:`close`.

    A forked child gets a thread of its own.

    Args:
        name: thread name.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: _Loop | None = None
        self._thread: threading.Thread | None = None
        self._owner = 0
        self._inherited: list[object] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def call(self, start: Callable[[], Coroutine[Any, Any, T]], timeout_s: float) -> T:
        """The result of the coroutine that ``start`` makes.

        Raises:
            TimeoutError: it did not end in time; it was cancelled.
            LedgerError: CLOSED, before or during the call.
        """
        loop = self._running_loop()
        future = asyncio.run_coroutine_threadsafe(_bounded(start, timeout_s), loop)
        try:
            return future.result(timeout_s + GRACE_S)
        except CancelledError:
            raise LedgerError(Code.CLOSED, "this chain was closed") from None
        except BaseException:
            future.cancel()
            raise

    def close(self, cleanup: Callable[[], Coroutine[Any, Any, None]] | None = None, wait_s: float = 2.5) -> None:
        """Cancel what runs, run ``cleanup`` for at most a second, end the thread. May be called twice.

        Args:
            cleanup: last coroutine to run on the loop.
            wait_s: how long to wait for the thread, which ends by itself in any case.
        """
        with self._lock:
            self._closed = True
            loop, thread, self._loop = self._loop, self._thread, None
            mine = self._owner == os.getpid()
        if loop is None or thread is None or not mine:
            return
        asyncio.run_coroutine_threadsafe(_shut_down(loop, cleanup), loop)
        thread.join(wait_s)

    def keep_for_parent(self, inherited: object) -> None:
        """Keep something that a forked child must neither use nor close."""
        self._inherited.append(inherited)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise LedgerError(Code.CLOSED, "this chain was closed")
            if self._loop is None or self._owner != os.getpid():
                self._inherited.append(self._loop)
                self._loop = _Loop()
                self._thread = threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True)
                self._owner = os.getpid()
                self._thread.start()
            return self._loop


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that can hang up on everybody: a polite close may wait for a peer that never answers."""

    def __init__(self) -> None:
        super().__init__()
        self._connections: WeakSet[asyncio.BaseTransport] = WeakSet()

    async def create_connection(self, *args: Any, **options: Any) -> Any:
        transport, protocol = await super().create_connection(*args, **options)
        self._connections.add(transport)
        return transport, protocol

    def hang_up(self) -> None:
        for transport in list(self._connections):
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()


async def _bounded(start: Callable[[], Coroutine[Any, Any, T]], timeout_s: float) -> T:
    return await asyncio.wait_for(start(), timeout_s)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _shut_down(loop: _Loop, cleanup: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    try:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=CLOSE_S)
        if cleanup is not None:
            await asyncio.wait([asyncio.ensure_future(cleanup())], timeout=CLOSE_S)
    finally:
        loop.hang_up()
        # Two more rounds let the transports release their sockets before the loop ends.
        loop.call_soon(loop.call_soon, loop.call_soon, loop.stop)
