"""Which link a pair uses in a round, or that it uses none: so that both take the same way.

One proposes and the other answers. The first proposes a link that is open, or dials one; the other dials too if nothing
came for half a second, in case only that direction works. Parts are sent when the other has said yes. Each may say no
instead, and then the pair uses libp2p; but who has proposed can only wait, since the yes may be under way.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from hivemind.p2p import PeerID

from hivetrain.averaging.debts import PATIENCE
from hivetrain.averaging.direct.contact import Contact
from hivetrain.averaging.direct.frames import Kind
from hivetrain.averaging.direct.link import Link
from hivetrain.averaging.direct.links import DIAL_S, DirectLinks
from hivetrain.averaging.libp2p import RoundService
from hivetrain.averaging.reduction import ExchangeError

logger = logging.getLogger(__name__)

_HELP_AFTER_S = 0.5
_LOOK_S = 0.25
_UNREACHABLE_S = 600.0
_MAX_EARLY = 8  # rounds of which one peer may speak before this peer is in them
_MAX_EARLY_PEERS = 1024


@dataclass(frozen=True)
class Pair:
    """This peer and another member of a round.

    Attributes:
        group: name of the group.
        member: the other's index.
        peer_id: the other's.
        theirs: where the other can be dialled.
        own: where this peer can be dialled.
        proposes: whether this peer proposes; the other one has it the other way round.
        can_call: whether the other can be called over libp2p.
    """

    group: bytes
    member: int
    peer_id: PeerID
    theirs: Contact
    own: Contact
    proposes: bool
    can_call: bool

    @property
    def key(self) -> tuple[bytes, PeerID]:
        return self.group, self.peer_id


class Agreements:
    """What the pairs of this peer's rounds agree on. Create it inside a running event loop.

    Args:
        links: of this peer.
        service: says no over libp2p.
        is_required: whether a pair without a link fails, instead of using libp2p.
        part_timeout_s: longest silence of a groupmate.
    """

    def __init__(self, links: DirectLinks, service: RoundService, is_required: bool, part_timeout_s: float) -> None:
        self._links, self._service = links, service
        self._is_required, self._part_timeout_s = is_required, part_timeout_s
        self._loop = asyncio.get_running_loop()
        self._unreachable: dict[PeerID, tuple[Contact, float]] = {}
        self._awaited: dict[tuple[bytes, PeerID], asyncio.Future[Link | None]] = {}
        self._early: dict[PeerID, dict[bytes, Link | None]] = {}
        self._refused: dict[tuple[bytes, PeerID], contextlib.ExitStack] = {}

    def hear(self, group: bytes, peer_id: PeerID, link: Link | None) -> None:
        """A peer has proposed a link for a group, or said yes to it, over that link; None: it has said no."""
        if (word := self._awaited.get((group, peer_id))) is not None:
            if not word.done():
                word.set_result(link)
        elif (group, peer_id) in self._refused:
            if link is not None:
                link.close("comes too late")  # so that who proposes it need not wait
        else:
            early = self._early[peer_id] = self._early.pop(peer_id, {})
            early[group] = link
            if len(early) > _MAX_EARLY:
                del early[next(iter(early))]
            if len(self._early) > _MAX_EARLY_PEERS:
                del self._early[next(iter(self._early))]

    def forget(self, group: bytes, peer_id: PeerID) -> None:
        """A round is over."""
        if (watch := self._refused.pop((group, peer_id), None)) is not None:
            watch.close()

    async def reach(self, pair: Pair) -> Link | None:
        """The link that both have agreed on, which has entered the round; None: they use libp2p.

        Raises:
            ExchangeError: the other end does not answer.
        """
        word = self._awaited[pair.key] = self._loop.create_future()
        early = self._early.get(pair.peer_id, {})
        if pair.group in early:
            word.set_result(early.pop(pair.group))
        try:
            return await (self._propose(pair, word) if pair.proposes else self._answer(pair, word))
        finally:
            del self._awaited[pair.key]

    async def _propose(self, pair: Pair, word: "asyncio.Future[Link | None]") -> Link | None:
        link = await self._obtain(pair, word)
        if word.done():  # it has not waited for the proposal
            return None
        if link is not None:
            self._agree_on(link, pair)
            try:
                await self._wait_for_yes(pair, link, word)
            except BaseException:
                link.leave(pair.group)
                raise
            if word.done() and word.result() is link:
                return link
            link.leave(pair.group)
            link.close("leads nowhere")
        if not word.done():
            await self._service.decline(pair.group, pair.peer_id)
        return None

    async def _wait_for_yes(self, pair: Pair, link: Link, word: "asyncio.Future[Link | None]") -> None:
        begun = time.monotonic()
        while not word.done() and not link.is_closed:
            silent_s = time.monotonic() - begun
            if silent_s > PATIENCE * self._part_timeout_s:
                raise ExchangeError(f"member {pair.member} sent nothing for {silent_s:.1f} s", [pair.member])
            await asyncio.wait({word}, timeout=_LOOK_S)

    async def _answer(self, pair: Pair, word: "asyncio.Future[Link | None]") -> Link | None:
        with contextlib.ExitStack() as watch:
            opened = watch.enter_context(self._links.expecting(pair.peer_id))
            helping = asyncio.create_task(self._help(pair, opened))
            try:
                await asyncio.wait({word}, timeout=DIAL_S + _HELP_AFTER_S)
            finally:
                helping.cancel()
            if word.done():
                link = word.result()
                if link is None:
                    return None
                if not link.is_closed:
                    self._agree_on(link, pair)
                    return link
            self._refused[pair.key] = watch.pop_all()  # goes on reading what comes, to refuse it
        if pair.can_call:
            await self._service.decline(pair.group, pair.peer_id)
        return None

    def _agree_on(self, link: Link, pair: Pair) -> None:
        self._links.keep(link)
        link.enter(pair.group)
        link.say(Kind.USE, pair.group)

    async def _obtain(self, pair: Pair, word: "asyncio.Future[Link | None]") -> Link | None:
        peer_id, theirs = pair.peer_id, pair.theirs
        if (link := self._links.find(peer_id)) is not None:
            return link
        if not theirs.dialable(pair.own) and not pair.own.port:
            return None
        known, until = self._unreachable.get(peer_id, (None, 0.0))
        if known is not None and known.places == theirs.places and time.monotonic() < until:
            return None
        with self._links.expecting(peer_id) as opened:
            dialling, waiting = asyncio.create_task(self._dial(pair)), asyncio.create_task(opened.wait())
            ends: set[asyncio.Future[Any]] = {waiting, word} if pair.own.port else {waiting, word, dialling}
            try:
                await asyncio.wait(ends, timeout=DIAL_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                dialling.cancel()
        link = self._links.find(peer_id)
        if link is None and not word.done() and not self._is_required:  # else there is nothing to spare
            self._unreachable[peer_id] = theirs, time.monotonic() + _UNREACHABLE_S
            logger.info("no direct link to %s; using libp2p", str(peer_id)[-8:])
        return link

    async def _help(self, pair: Pair, opened: asyncio.Event) -> None:
        """Opens a link if the other end does not."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(opened.wait(), _HELP_AFTER_S)
        if not opened.is_set():
            await self._dial(pair)

    async def _dial(self, pair: Pair) -> None:
        if addresses := pair.theirs.dialable(pair.own):
            try:
                await self._links.dial(pair.peer_id, addresses, DIAL_S)
            except Exception:  # nobody waits for this task's result; without a link there is still libp2p
                logger.exception("cannot dial a member")
