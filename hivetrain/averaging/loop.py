"""The network's event loop, in a thread of its own beside the training thread.

The training thread never waits blindly: :meth:`NetworkLoop.call` wakes up several times a second to ask whether it
should give up, so a signal ends a wait within a fraction of a second.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_POLL_S = 0.2


class Interrupted(Exception):
    """The caller asked to give up the wait."""


class NetworkLoop:
    """An event loop in a daemon thread. ``start`` it, ``call`` coroutines on it, ``stop`` it."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def spawn(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Schedules ``work`` and returns at once."""
        return asyncio.run_coroutine_threadsafe(self._held(work), self._loop)

    def call(self, work: Coroutine[Any, Any, T], timeout_s: float, give_up: Callable[[], bool] = lambda: False) -> T:
        """Runs ``work`` and returns its result; see :meth:`wait`."""
        return self.wait(self.spawn(work), timeout_s, give_up)

    def wait(
        self,
        future: "concurrent.futures.Future[T]",
        timeout_s: float,
        give_up: Callable[[], bool] = lambda: False,
    ) -> T:
        """Waits for what was spawned.

        Raises:
            TimeoutError: it took longer than ``timeout_s``; it has been cancelled.
            Interrupted: ``give_up`` returned true; it has been cancelled.
        """
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                try:
                    return future.result(timeout=_POLL_S)
                except concurrent.futures.TimeoutError:
                    if future.done():
                        return future.result()
                if give_up():
                    raise Interrupted
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no result within {timeout_s:g} s")
        finally:
            future.cancel()

    def soon(self, function: Callable[[], object]) -> None:
        """Calls ``function`` on the loop's thread."""
        self._loop.call_soon_threadsafe(function)

    def stop(self, timeout_s: float = 3.0) -> None:
        """Cancels what still runs and ends the thread; returns after ``timeout_s`` at the latest."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.spawn(self._cancel_all()).result(timeout=timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    async def _held(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs ``work`` with a strong reference to its task: asyncio itself keeps only weak ones."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        finally:
            self._tasks.discard(task)

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=1) if tasks else None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
