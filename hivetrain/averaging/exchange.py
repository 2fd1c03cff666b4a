"""Butterfly all-reduce of one flat vector inside a fixed group: all of it or nothing.

Each member reduces its own slice and sends the *averaged part itself*, encoded once, to all members. So whoever
finishes holds the same bytes as everybody else, which hivemind's runner (it returns ``average - what you sent``,
rounded per sender, and carries on without members that fail) cannot promise. Any fault ends the exchange for all.

Algorithm: butterfly all-reduce, Moshpit SGD (arXiv:2103.03239), without its tolerance of partial results.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hivetrain.averaging.codecs import Codec
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.memory import ResultMemory
from hivetrain.averaging.reduction import ExchangeError, Reduction, Traffic
from hivetrain.averaging.rules import RULES, Rule

# Sends an iterator of encoded parts to a member and yields its encoded answers, one for each part.
OpenStream = Callable[[int, AsyncIterator[bytes]], AsyncGenerator[bytes, None]]
# Exchanges everything with one member: returns when nothing is owed in either direction, raises ExchangeError.
Talk = Callable[["Exchange", int], Coroutine[Any, Any, None]]

# A reducer waits for others before it answers; so that it can name them first, it gets more time than they do.
PATIENCE = 1.5
_LAG = 0.05  # of the part timeout: a wait that is more than chance
_BRAKE = 0.5  # of the time so far


@dataclass
class Exchange:
    """One all-reduce. Create it inside a running event loop.

    Args:
        me: this member's index.
        weights: averaging weight of each member, positive sum; equal on all members.
        layout: equal on all members.
        vector: shape (n,), fp32 on CPU; only read.
        codec: equal on all members.
        part_timeout_s: longest wait for any single part.
        rule: how the members' values become one; equal on all members.
        memory: where the result is put.
    """

    me: int
    weights: Sequence[float]
    layout: Layout
    vector: torch.Tensor
    codec: Codec
    part_timeout_s: float
    rule: Rule = RULES["mean"]
    memory: ResultMemory = field(default_factory=ResultMemory)

    def __post_init__(self) -> None:
        result = self.memory.take(self.vector)
        self.reduction = Reduction(self.me, self.weights, self.layout, self.vector, self.codec, self.rule, result)
        self.numel = self.vector.numel()
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._changed: set[asyncio.Future[None]] = set()
        self._is_woken = False
        self._streams, self._is_reducing = 0, True
        self.reduction.listen(self._tell)

    @property
    def traffic(self) -> Traffic:
        """What has travelled so far."""
        return self.reduction.traffic

    async def run(self, talk: Talk) -> torch.Tensor:
        """Exchanges with all members and returns the weighted mean, shape (n,), the same bytes on every member.

        Raises:
            ExchangeError: a member failed, sent something wrong, or stalled for longer than ``part_timeout_s``.
        """
        tasks = [asyncio.create_task(self._reduce_own())]
        tasks += [asyncio.create_task(talk(self, m)) for m in range(len(self.weights)) if m != self.me]
        try:
            work = asyncio.create_task(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
            waiting: set[asyncio.Future[Any]] = {work, self._failure}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            work.cancel()
            if self._failure.done():
                self._failure.result()
            for task in sorted(tasks, key=lambda task: not task.done()):  # the first to fail, not the first in line
                await task
        except ExchangeError as error:
            self.fail(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.vector = torch.empty(0)  # the exchange is kept for its outcome, but not what it held
        return self.reduction.detach()

    def fail(self, error: ExchangeError) -> None:
        """Ends the exchange here, and for every member that waits for an answer of this one."""
        self.reduction.fail(error)

    def laggards(self) -> list[int]:
        """Members whose parts keep the own slice waiting, for a while now, though those of others are there."""
        reduction = self.reduction
        waited_s = time.monotonic() - reduction.completed_at
        if reduction.completed >= len(reduction.ranges[self.me]) or waited_s < _LAG * self.part_timeout_s:
            return []
        late = reduction.missing(reduction.completed)
        return late if len(late) < len(self.weights) - 1 or len(late) == 1 else []

    def brakes(self) -> list[int]:
        """Members for whom alone the own slice has waited most of the time so far."""
        reduction, now = self.reduction, time.monotonic()
        waited_s = list(reduction.waited_s)
        if (alone := reduction.last_one()) is not None:
            member, since = alone
            waited_s[member] += now - since
        least_s = max(_LAG * self.part_timeout_s, _BRAKE * (now - reduction.begun_at))
        return [member for member, seconds in enumerate(waited_s) if seconds >= least_s]

    async def serve(self, member: int, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Takes a member's parts of the own slice and yields the averages in the same order."""
        reader = asyncio.create_task(self._read_parts(member, stream))
        self._streams += 1
        try:
            for index in range(len(self.reduction.ranges[self.me])):
                await self._completion_of(index)
                yield bytes(self.reduction.average(index))
                self.reduction.taken(index)
            await reader
            # Whoever closes a stream may lose what is still under way on it, in both directions. So the member says
            # goodbye when it has all averages, and the stream is not closed before.
            async with asyncio.timeout(self.part_timeout_s):
                if await anext(stream, None) is not None:
                    self.fail(ExchangeError(f"member {member}: sent more than its parts", [member]))
        except TimeoutError:
            self.fail(ExchangeError(f"member {member}: did not take the averages", [member]))
        finally:
            self._streams -= 1
            reader.cancel()

    async def talk_over(self, open_stream: OpenStream, member: int) -> None:
        """Sends a member its parts through a stream and takes the averages; what it sends here comes by ``serve``."""
        ranges, has_all = self.reduction.ranges[member], asyncio.Event()
        if not ranges:
            return
        self._streams += 1
        try:
            async with contextlib.aclosing(open_stream(member, self._outgoing(member, has_all))) as answers:
                for index in range(len(ranges)):
                    data = await self._next(answers, member, PATIENCE * self.part_timeout_s)
                    try:
                        self.reduction.store(member, index, data)
                    except ValueError as error:
                        raise ExchangeError(f"member {member}: {error}", [member]) from error
                has_all.set()
                with contextlib.suppress(ExchangeError):  # all that is needed has arrived
                    # The goodbye; returning at once could cut off our own.
                    await self._next(answers, member, self.part_timeout_s)
        finally:
            self._streams -= 1

    async def changed(self, timeout_s: float) -> None:
        """Returns when something has become possible or has failed, or when the time is up."""
        waiter = self._loop.create_future()
        self._changed.add(waiter)
        try:
            await asyncio.wait({waiter}, timeout=timeout_s)
        finally:
            self._changed.discard(waiter)

    def _tell(self) -> None:
        """Called on any thread."""
        # Waking costs as much as a part. With no stream, the loop has to know of an end only, and links need no loop.
        is_end = self.reduction.error is not None or (self._is_reducing and self.reduction.is_complete)
        if (self._streams or is_end) and not self._is_woken:  # woken it sees this too
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_woken = False
        if self.reduction.error is not None and not self._failure.done():
            self._failure.set_exception(self.reduction.error)
            self._failure.exception()  # retrieved: nobody has to wait on it
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)

    async def _read_parts(self, member: int, stream: AsyncIterator[bytes]) -> None:
        try:
            for index in range(len(self.reduction.ranges[self.me])):
                # No deadline: the member may wait for others to open its window. Whoever is late, is late in a part.
                self.reduction.add(member, index, await self._next(stream, member, None))
                await asyncio.sleep(0)  # let messages in
        except ExchangeError as error:
            self.fail(error)
        except ValueError as error:
            self.fail(ExchangeError(f"member {member}: {error}", [member]))

    async def _reduce_own(self) -> None:
        await self._completion_of(len(self.reduction.ranges[self.me]) - 1)
        self._is_reducing = False

    async def _outgoing(self, member: int, has_all: asyncio.Event) -> AsyncIterator[bytes]:
        for index in range(len(self.reduction.ranges[member])):
            while not self.reduction.may_send(member, index):
                await self.changed(self.part_timeout_s)
            yield bytes(self.reduction.outgoing(member, index))
        await has_all.wait()

    async def _completion_of(self, index: int) -> None:
        reduction = self.reduction
        while reduction.completed <= index:
            if reduction.error is not None:
                raise ExchangeError(f"exchange given up: {reduction.error}", reduction.error.culprits)
            left_s = reduction.completed_at + self.part_timeout_s - time.monotonic()
            if left_s <= 0:
                missing = reduction.missing(reduction.completed)
                late = ", ".join(str(member) for member in missing)
                error = ExchangeError(f"member(s) {late} sent nothing for {self.part_timeout_s:g} s", missing)
                self.fail(error)
                raise error
            await self.changed(left_s)

    async def _next(self, stream: AsyncIterator[bytes], member: int, timeout_s: float | None) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(stream)
        except TimeoutError:
            raise ExchangeError(f"member {member} sent nothing for {timeout_s:g} s", [member]) from None
        except StopAsyncIteration:
            raise ExchangeError(f"member {member} stopped before the end", [member]) from None


def over_streams(open_stream: OpenStream) -> Talk:
    """Talks to all members through streams."""
    return lambda exchange, member: exchange.talk_over(open_stream, member)
