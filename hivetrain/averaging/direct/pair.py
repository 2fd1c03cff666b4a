"""A round's way to a member before it is known which."""

import asyncio

from hivetrain.averaging.direct.channel import DirectChannel
from hivetrain.averaging.direct.link import Link
from hivetrain.averaging.exchange import Exchange
from hivetrain.averaging.transport import Channel


class PairChannel(Channel):
    """A channel that is still being chosen.

    Args:
        choice: of the channel.
        fallback: takes the ballot as long as there is none.
    """

    def __init__(self, choice: "asyncio.Task[Channel]", fallback: Channel) -> None:
        self._choice, self._fallback = choice, fallback

    @property
    def name(self) -> str:  # type: ignore[override]
        """Which way was chosen; "none" if it is not known."""
        chosen = self._chosen()
        return chosen.name if chosen is not None else "none"

    async def exchange(self, stage: int, exchange: Exchange) -> None:
        await (await asyncio.shield(self._choice)).exchange(stage, exchange)

    async def vote(self, ballot: bytes) -> bytes:
        return await (self._chosen() or self._fallback).vote(ballot)

    def cancel(self) -> Link | None:
        """The round is over; returns the link that it used."""
        chosen = self._chosen()
        if chosen is None:
            self._choice.cancel()
        return chosen.link if isinstance(chosen, DirectChannel) else None

    def _chosen(self) -> Channel | None:
        done = self._choice.done() and not self._choice.cancelled() and self._choice.exception() is None
        return self._choice.result() if done else None
