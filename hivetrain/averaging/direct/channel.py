"""One round's way to a member over a direct link."""

import asyncio

from hivetrain.averaging.direct.frames import Kind
from hivetrain.averaging.direct.link import Link
from hivetrain.averaging.direct.session import Session
from hivetrain.averaging.exchange import Exchange
from hivetrain.averaging.reduction import ExchangeError
from hivetrain.averaging.transport import Channel


class DirectChannel(Channel):
    """A way to a member over a link. Create it inside a running event loop.

    Args:
        name: the link's mode, for the report.
        group: name of the group.
        member: who is at the other end.
        answer: gets the member's answer to the own ballot.
        fallback: takes the ballot when the link has broken.
        part_timeout_s: longest time that its answer to a ballot may take.
    """

    def __init__(
        self, name: str, link: Link, group: bytes, member: int, answer: "asyncio.Future[bytes]", fallback: Channel,
        part_timeout_s: float,
    ) -> None:  # fmt: skip
        self.name, self.link, self._group, self._member = name, link, group, member
        self._answer, self._fallback, self._part_timeout_s = answer, fallback, part_timeout_s

    async def exchange(self, stage: int, exchange: Exchange) -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def on_done() -> None:
            loop.call_soon_threadsafe(done.set)

        session = Session(self._group, stage, self._member, exchange.reduction, on_done)
        self.link.attach(stage, session)
        await done.wait()

    async def vote(self, ballot: bytes) -> bytes:
        if self.link.is_closed:
            return await self._fallback.vote(ballot)
        self.link.say(Kind.BALLOT, self._group, ballot)
        try:
            async with asyncio.timeout(self._part_timeout_s):
                return await asyncio.shield(self._answer)
        except TimeoutError:
            raise ExchangeError(f"no answer of member {self._member}") from None
