"""The exchanges of one round, one after the other: a compressor may need the average of one for the next."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import torch

from hivetrain.averaging.codecs import Codec
from hivetrain.averaging.compression import Stages
from hivetrain.averaging.exchange import Exchange
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.memory import ResultMemory
from hivetrain.averaging.reduction import ExchangeError, Traffic
from hivetrain.averaging.rules import RULES, Rule
from hivetrain.averaging.transport import Channel

MAX_STAGES = 2


class StagedExchange:
    """Runs a compressor's stages through one :class:`Exchange` each. Create it inside a running event loop.

    Args:
        me: this member's index.
        weights: averaging weight of each member; equal on all members.
        layout: how many elements each member reduces of a vector of n elements; equal on all members.
        stages: the compressor at work on this member's gradient.
        codec: equal on all members.
        part_timeout_s: longest wait for any single part, and for a member that is a stage behind.
        rule: how the members' values become one; equal on all members.
        memory: where results are put.
    """

    def __init__(
        self, me: int, weights: Sequence[float], layout: Callable[[int], Layout], stages: Stages, codec: Codec,
        part_timeout_s: float, rule: Rule = RULES["mean"], memory: ResultMemory | None = None,
    ) -> None:  # fmt: skip
        self._me, self._weights, self._layout, self._stages = me, weights, layout, stages
        self._codec, self._part_timeout_s, self._rule = codec, part_timeout_s, rule
        self._memory = memory or ResultMemory()
        loop = asyncio.get_running_loop()
        self._exchanges: list[asyncio.Future[Exchange]] = [loop.create_future() for _ in range(MAX_STAGES)]
        self._failure: ExchangeError | None = None
        self._quit: ExchangeError | None = None  # that, or that a member has given up

    @property
    def traffic(self) -> Traffic:
        """Payload of all stages together."""
        each = [exchange.traffic for exchange in self._opened()]
        return Traffic(sum(t.sent for t in each), sum(t.received for t in each), sum(t.elements for t in each))

    @property
    def numel(self) -> int:
        """Elements of the stages begun so far."""
        return sum(exchange.numel for exchange in self._opened())

    async def run(self, channels: Mapping[int, Channel]) -> torch.Tensor:
        """Returns the averaged gradient, shape (n,).

        Raises:
            ExchangeError: as :meth:`Exchange.run`.
        """
        vector = await asyncio.to_thread(next, self._stages)
        for stage in range(MAX_STAGES):
            average = await self._run_stage(stage, vector, channels)
            vector, result = await asyncio.to_thread(_advance, self._stages, average)
            if result is not None:
                return result
        raise AssertionError(f"a compressor has at most {MAX_STAGES} stages")

    async def _run_stage(self, stage: int, vector: torch.Tensor, channels: Mapping[int, Channel]) -> torch.Tensor:
        if self._quit is not None:
            raise self._quit
        exchange = Exchange(
            self._me, self._weights, self._layout(vector.numel()), vector, self._codec, self._part_timeout_s,
            self._rule, self._memory,
        )  # fmt: skip
        self._exchanges[stage].set_result(exchange)
        return await exchange.run(lambda exchange, member: channels[member].exchange(stage, exchange))

    async def serve(self, stage: int, member: int, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Takes a member's parts of a stage and yields the averages; waits if this member is not there yet."""
        if self._failure is not None:
            raise self._failure
        if not 0 <= stage < MAX_STAGES:
            raise ExchangeError(f"member {member} asks for stage {stage}")
        try:
            exchange = await asyncio.wait_for(asyncio.shield(self._exchanges[stage]), 2 * self._part_timeout_s)
        except TimeoutError:
            raise ExchangeError(f"this member did not reach stage {stage} in time") from None
        async for average in exchange.serve(member, stream):
            yield average

    def digests(self) -> list[bytes]:
        """One of each stage's averages, as they travelled."""
        return [exchange.reduction.digest() for exchange in self._opened()]

    def laggards(self) -> list[int]:
        """Members for whom the stage under way waits; see :meth:`Exchange.laggards`."""
        return self._opened()[-1].laggards() if self._opened() else []

    def late_reducers(self) -> list[int]:
        """Members whose averages the stage under way waits for; see :meth:`Exchange.late_reducers`."""
        return self._opened()[-1].late_reducers() if self._opened() else []

    def brakes(self, left_s: float) -> list[int]:
        """Members for whom the stage waited most of the time, if time is up but for the part timeout; else nobody."""
        return self._opened()[-1].brakes() if self._opened() and left_s < self._part_timeout_s else []

    def fail(self, error: ExchangeError) -> None:
        """Ends all stages, here and for every member that waits for an answer; see :meth:`Exchange.fail`."""
        if error.quitter is None:
            self._failure = self._failure or error
        self._quit = self._quit or error
        for exchange in self._opened():
            exchange.fail(error)

    def _opened(self) -> list[Exchange]:
        return [future.result() for future in self._exchanges if future.done()]


def _advance(stages: Stages, average: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next vector, or the result at the end (an exception may not be a StopIteration in a coroutine)."""
    try:
        return stages.send(average), None
    except StopIteration as end:
        return average, end.value
