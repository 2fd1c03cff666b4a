"""A transport that drops what is still under way when a stream is closed, as libp2p's daemon does under load."""

import asyncio

import pytest
import torch
from members import digests, make_exchanges

from hivetrain.averaging.exchange import over_streams


async def _run_over_hasty_streams(exchanges):
    """Runs all members; who closes a stream cuts off, in both directions, what the other side has not read yet."""

    def opener(me):
        async def open_stream(member, parts):
            up, down = asyncio.Queue(2), asyncio.Queue()
            closed = asyncio.Event()

            async def arriving():
                while not closed.is_set() and (part := await up.get()) is not None:
                    yield part

            async def send():
                async for part in parts:
                    await up.put(part)
                await up.put(None)

            async def answer():
                async for average in exchanges[member].serve(me, arriving()):
                    down.put_nowait(average)
                while not down.empty():  # cut off
                    down.get_nowait()
                down.put_nowait(None)

            tasks = [asyncio.create_task(send()), asyncio.create_task(answer())]
            try:
                while (average := await down.get()) is not None:
                    yield average
                    await asyncio.sleep(0.001)  # reads more slowly than the other side writes
            finally:
                closed.set()
                for task in tasks:
                    task.cancel()

        return open_stream

    runs = (exchange.run(over_streams(opener(me))) for me, exchange in enumerate(exchanges))
    return await asyncio.gather(*runs, return_exceptions=True)


@pytest.mark.parametrize("members", [2, 3])
def test_no_average_is_lost_when_streams_close_hastily(members, monkeypatch):
    monkeypatch.setattr("hivetrain.averaging.layout.PART_ELEMENTS", 10)
    vectors = [torch.full((100 * members,), float(me)) for me in range(members)]

    async def main():
        return await _run_over_hasty_streams(make_exchanges(vectors, [1.0] * members, [100] * members))

    assert len(digests(asyncio.run(main()))) == 1
