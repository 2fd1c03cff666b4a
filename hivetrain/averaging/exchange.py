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
from hivetrain.averaging.debts import Debt
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.memory import ResultMemory
from hivetrain.averaging.reduction import ExchangeError, Reduction, Traffic
from hivetrain.averaging.rules import RULES, Rule

# Sends an iterator of encoded parts to a member and yields its encoded answers, one for each part.
OpenStream = Callable[[int, AsyncIterator[bytes]], AsyncGenerator[bytes, None]]
# Exchanges everything with one member: returns when nothing is owed in either direction, raises ExchangeError.
Talk = Callable[["Exchange", int], Coroutine[Any, Any, None]]

# In part timeouts.
_LAG = 0.05  # a wait that is more than chance
_TICK = 0.02
_DEFENCE = 1.5
_AGREED = 1.75  # more than an honest reducer can be late by another's fault


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
        self._others = [member for member in range(len(self.weights)) if member != self.me]
        self._hearsay: ExchangeError | None = None
        self._suspects: dict[int, int] = {}  # which part each owed when it was accused
        self._defends_until = 0.0
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
        tasks += [asyncio.create_task(self._talk(talk, member)) for member in self._others]
        watch = asyncio.create_task(self._watch())
        try:
            work = asyncio.create_task(asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION))
            waiting: set[asyncio.Future[Any]] = {work, watch, self._failure}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            work.cancel()
            for ended in (self._failure, watch):
                if ended.done():
                    ended.result()
            for task in sorted(tasks, key=lambda task: not task.done()):  # the first to fail, not the first in line
                await task
        finally:
            for task in (*tasks, watch):
                task.cancel()
            await asyncio.gather(*tasks, watch, return_exceptions=True)
        self.vector = torch.empty(0)  # the exchange is kept for its outcome, but not what it held
        return self.reduction.detach()

    def fail(self, error: ExchangeError) -> None:
        """Ends the exchange here, and for every member that waits for an answer of this one.

        That a member has given up ends it as soon as this one has seen for itself whether whom it accuses is late.
        """
        if error.quitter is None:
            self.reduction.fail(error)
        elif error.quitter not in self.reduction.quitters:
            self._hear(error, error.quitter)

    def laggards(self) -> list[int]:
        """Members whose parts keep the own slice waiting, though those of others are there, or did most of the time."""
        present = [member for member in self._others if member not in self.reduction.quitters]
        return self.reduction.debts.late(present, _LAG * self.part_timeout_s) or self.brakes()

    def brakes(self) -> list[int]:
        """Members for whom alone the own slice has waited most of the time, and no less than the part timeout."""
        return self.reduction.debts.brakes(self.part_timeout_s)

    def late_reducers(self) -> list[int]:
        """Members that alone have owed averages for the part timeout, by their fault or that of whom they wait for."""
        return [] if self.reduction.quitters else self.reduction.debts.late_reducers(self._others, self.part_timeout_s)

    async def serve(self, member: int, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Takes a member's parts of the own slice and yields the averages in the same order."""
        if not self.reduction.claim(member, "stream"):
            raise ExchangeError(f"member {member} uses two ways at once")
        reader = asyncio.create_task(self._read_parts(member, stream))
        self._streams += 1
        try:
            for index in range(len(self.reduction.ranges[self.me])):
                await self._completion_of(index)
                yield bytes(self.reduction.average(member, index))
                self.reduction.taken(member, index)
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
                    data = await self._next(answers, member, None)  # no deadline: see _watch
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
                self.reduction.add(member, index, await self._next(stream, member, None))
                await asyncio.sleep(0)  # let messages in
        except ExchangeError as error:
            self.fail(error)
        except ValueError as error:
            self.fail(ExchangeError(f"member {member}: {error}", [member]))

    async def _talk(self, talk: Talk, member: int) -> None:
        try:
            await talk(self, member)
        except ExchangeError as error:
            self.fail(error)
            await asyncio.wait({self._failure})
            self._failure.result()

    async def _watch(self) -> None:
        """Fails the exchange when somebody is late, or when what others say of it has been looked into."""
        while True:
            now = time.monotonic()
            late = [m for m in self._others if any(self._age(debt, now) >= debt.limit for debt in self._claims_on(m))]
            if late:
                names = ", ".join(str(member) for member in late)
                text = f"member(s) {names} did not send what was due for {self.part_timeout_s:g} s"
                known = self._hearsay.culprits if self._hearsay else ()
                self.fail(ExchangeError(text, list(dict.fromkeys([*late, *known]))))
            self._settle()
            await asyncio.sleep(_TICK * self.part_timeout_s)

    def _claims_on(self, member: int) -> list[Debt]:
        """What a member owes whatever others do: once somebody has given up, parts alone."""
        quitters, debts = self.reduction.quitters, self.reduction.debts.of(member)
        if not quitters:
            return debts
        return [debt for debt in debts if debt.kind == "part" and member not in quitters]

    def _age(self, debt: Debt, now: float) -> float:
        """In part timeouts."""
        return (now - debt.since) / self.part_timeout_s

    def _hear(self, error: ExchangeError, quitter: int) -> None:
        now, accused = time.monotonic(), error.accused
        if accused is not None and accused not in (self.me, quitter) and accused not in self.reduction.quitters:
            debts = self.reduction.debts.of(accused)
            if any(debt.kind == "average" and self._age(debt, now) >= _AGREED for debt in debts):
                error = ExchangeError(str(error), [accused], quitter, accused)
            self._suspects.update((accused, debt.index) for debt in debts if debt.kind == "part")
        elif accused == self.me:  # by going on this member shows the others that it is not late
            self._defends_until = now + _DEFENCE * self.part_timeout_s
        self.reduction.quitters.add(quitter)
        if self._hearsay is None or error.culprits:
            self._hearsay = error
        self._settle()

    def _settle(self) -> None:
        quitters = self.reduction.quitters
        is_open = any(
            member not in quitters and ("part", index) in ((debt.kind, debt.index) for debt in self._claims_on(member))
            for member, index in self._suspects.items()
        )
        is_defending = len(quitters) < len(self._others) and time.monotonic() < self._defends_until
        if self._hearsay is not None and not is_open and not is_defending:
            self.reduction.end(self._hearsay)

    async def _reduce_own(self) -> None:
        await self._completion_of(len(self.reduction.ranges[self.me]) - 1)
        self._is_reducing = False

    async def _outgoing(self, member: int, has_all: asyncio.Event) -> AsyncIterator[bytes]:
        for index in range(len(self.reduction.ranges[member])):
            while not self.reduction.may_send(member, index):
                await self.changed(self.part_timeout_s)
            yield bytes(self.reduction.outgoing(member, index))
            self.reduction.debts.send(member, index)
        await has_all.wait()

    async def _completion_of(self, index: int) -> None:
        reduction = self.reduction
        while reduction.completed <= index:
            if reduction.error is not None:
                raise ExchangeError(f"exchange given up: {reduction.error}", reduction.error.culprits)
            await self.changed(self.part_timeout_s)

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
