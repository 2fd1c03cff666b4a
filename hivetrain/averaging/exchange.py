"""Butterfly all-reduce of one flat vector inside a fixed group: all of it or nothing.

Each member reduces its own slice and sends the *averaged part itself*, encoded once, to all members. So whoever
finishes holds the same bytes as everybody else, which hivemind's runner (it returns ``average - what you sent``,
rounded per sender, and carries on without members that fail) cannot promise. Any fault ends the exchange for all.

Algorithm: butterfly all-reduce, Moshpit SGD (arXiv:2103.03239), without its tolerance of partial results.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hivetrain.averaging.codecs import Codec

PART_ELEMENTS = 2**17

# Sends an iterator of encoded parts to a member and yields its encoded answers, one for each part.
OpenStream = Callable[[int, AsyncIterator[bytes]], AsyncGenerator[bytes, None]]


class ExchangeError(Exception):
    """The exchange cannot be completed; the message names the member where one is to blame."""


@dataclass(frozen=True)
class Layout:
    """Which member reduces which elements: member i owns ``bounds[i] <= element < bounds[i + 1]``."""

    bounds: tuple[int, ...]

    def parts(self, member: int) -> list[tuple[int, int]]:
        """The (start, stop) ranges of a member's slice, in the order in which they travel."""
        start, stop = self.bounds[member], self.bounds[member + 1]
        return [(begin, min(begin + PART_ELEMENTS, stop)) for begin in range(start, stop, PART_ELEMENTS)]

    @classmethod
    def split(cls, numel: int, sizes: Sequence[int]) -> "Layout":
        """Builds a layout from the number of elements per member."""
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + int(size))
        assert bounds[-1] == numel, "slices must cover the vector"
        return cls(tuple(bounds))


@dataclass
class _Part:
    """One part being reduced here: the running sum (a view of the result) and the encoded average when all are in."""

    total: torch.Tensor
    missing: set[int]
    average: asyncio.Future[bytes]


@dataclass
class Traffic:
    """Payload bytes to and from other members, and elements of the result that have arrived."""

    sent: int = 0
    received: int = 0
    elements: int = 0


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
    """

    me: int
    weights: Sequence[float]
    layout: Layout
    vector: torch.Tensor
    codec: Codec
    part_timeout_s: float
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        everyone = range(len(self.weights))
        self._result = torch.empty_like(self.vector)
        self._total_weight = float(sum(self.weights))
        self._failure: asyncio.Future[None] = loop.create_future()
        self._parts = [
            _Part(self._result[start:stop], set(everyone), loop.create_future())
            for start, stop in self.layout.parts(self.me)
        ]

    async def run(self, open_stream: OpenStream) -> torch.Tensor:
        """Exchanges with all members and returns the weighted mean, shape (n,), the same bytes on every member.

        Raises:
            ExchangeError: a member failed, sent something wrong, or stalled for longer than ``part_timeout_s``.
        """
        tasks = [asyncio.create_task(self._reduce_own())]
        for member in range(len(self.weights)):
            if member != self.me and self.layout.parts(member):
                tasks.append(asyncio.create_task(self._talk_to(member, open_stream)))
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
        return self._result

    def fail(self, error: ExchangeError) -> None:
        """Ends the exchange here, and for every member that waits for an answer of this one."""
        if not self._failure.done():
            self._failure.set_exception(error)
            self._failure.exception()  # retrieved: nobody has to wait on it
        for part in self._parts:
            if not part.average.done():
                part.average.cancel()

    async def serve(self, member: int, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Takes a member's parts of the own slice and yields the averages in the same order."""
        reader = asyncio.create_task(self._read_parts(member, stream))
        try:
            for part in self._parts:
                average = await self._average_of(part)
                self.traffic.sent += len(average)
                yield average
            await reader
            # Whoever closes a stream may lose what is still under way on it, in both directions. So the member says
            # goodbye when it has all averages, and the stream is not closed before.
            async with asyncio.timeout(self.part_timeout_s):
                if await anext(stream, None) is not None:
                    self.fail(ExchangeError(f"member {member}: sent more than its parts"))
        except TimeoutError:
            self.fail(ExchangeError(f"member {member}: did not take the averages"))
        finally:
            reader.cancel()

    async def _read_parts(self, member: int, stream: AsyncIterator[bytes]) -> None:
        try:
            for part in self._parts:
                data = await self._next(stream, member)
                self.traffic.received += len(data)
                self._add(part, member, self._decode_finite(data, part.total.numel()))
        except (ValueError, TimeoutError, ExchangeError) as error:
            self.fail(ExchangeError(f"member {member}: {error}"))

    def _decode_finite(self, data: bytes, numel: int) -> torch.Tensor:
        values = self.codec.decode(data, numel)
        # One such value would end in everybody's params, for good, and makes the sum such a value too: the sum is
        # twenty times as fast to look at, but too large values can make it infinite as well.
        if not values.sum().isfinite() and not values.isfinite().all():
            raise ValueError("sent values that are infinite or not numbers")
        return values

    async def _reduce_own(self) -> None:
        """Adds the own values to the own slice; the own result, too, is decoded from the bytes that the others get."""
        for (start, stop), part in zip(self.layout.parts(self.me), self._parts, strict=True):
            values = self.vector[start:stop]
            if self.codec.name != "none":
                values = self.codec.decode(self.codec.encode(values), stop - start)
            self._add(part, self.me, values)
            await asyncio.sleep(0)  # let messages in
        for (start, stop), part in zip(self.layout.parts(self.me), self._parts, strict=True):
            self._store(start, stop, await self._average_of(part))

    def _add(self, part: _Part, member: int, values: torch.Tensor) -> None:
        if member not in part.missing:
            raise ExchangeError(f"member {member} sent a part twice")
        is_first = len(part.missing) == len(self.weights)
        part.missing.discard(member)
        # fp32 sums are commutative but not associative; only this member computes them, so all see the same rounding.
        share = self.weights[member] / self._total_weight
        if is_first:
            torch.mul(values, share, out=part.total)
        else:
            part.total.add_(values, alpha=share)
        if not part.missing and not part.average.done():
            part.average.set_result(self.codec.encode(part.total))

    async def _talk_to(self, member: int, open_stream: OpenStream) -> None:
        has_all = asyncio.Event()
        async with contextlib.aclosing(open_stream(member, self._outgoing(member, has_all))) as answers:
            for start, stop in self.layout.parts(member):
                data = await self._next(answers, member)
                self.traffic.received += len(data)
                try:
                    self._store(start, stop, data)
                except ValueError as error:
                    raise ExchangeError(f"member {member}: {error}") from error
            has_all.set()
            with contextlib.suppress(ExchangeError):  # all that is needed has arrived
                await self._next(answers, member)  # the goodbye; returning at once could cut off our own

    async def _outgoing(self, member: int, has_all: asyncio.Event) -> AsyncIterator[bytes]:
        for start, stop in self.layout.parts(member):
            data = self.codec.encode(self.vector[start:stop])
            self.traffic.sent += len(data)
            yield data
        await has_all.wait()

    def _store(self, start: int, stop: int, data: bytes) -> None:
        self._result[start:stop] = self.codec.decode(data, stop - start)
        self.traffic.elements += stop - start

    async def _average_of(self, part: _Part) -> bytes:
        try:
            async with asyncio.timeout(self.part_timeout_s):
                return await asyncio.shield(part.average)
        except TimeoutError:
            late = ", ".join(str(member) for member in sorted(part.missing))
            error = ExchangeError(f"member(s) {late} sent nothing for {self.part_timeout_s:g} s")
            self.fail(error)
            raise error from None
        except asyncio.CancelledError:
            if self._failure.done():
                raise ExchangeError(f"exchange given up: {self._failure.exception()}") from None
            raise

    async def _next(self, stream: AsyncIterator[bytes], member: int) -> bytes:
        try:
            async with asyncio.timeout(self.part_timeout_s):
                return await anext(stream)
        except TimeoutError:
            raise ExchangeError(f"member {member} sent nothing for {self.part_timeout_s:g} s") from None
        except StopAsyncIteration:
            raise ExchangeError(f"member {member} stopped before the end") from None
