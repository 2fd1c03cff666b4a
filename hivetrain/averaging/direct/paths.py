"""Which way a round takes to each member: a direct link where there is one, or libp2p.

It measures how fast the links are, and passes on what comes through them beside the parts: ballots and answers.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from hivemind.p2p import PeerID

from hivetrain.averaging.direct.agreement import Agreements, Pair
from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.direct.channel import DirectChannel
from hivetrain.averaging.direct.contact import Contact
from hivetrain.averaging.direct.frames import Header, Kind
from hivetrain.averaging.direct.handshake import Credentials
from hivetrain.averaging.direct.link import Link
from hivetrain.averaging.direct.links import DirectLinks
from hivetrain.averaging.direct.pair import PairChannel
from hivetrain.averaging.group import Group
from hivetrain.averaging.libp2p import LibP2PChannel, RoundService
from hivetrain.averaging.reduction import ExchangeError
from hivetrain.averaging.round import RoundTable
from hivetrain.averaging.transport import Channel

logger = logging.getLogger(__name__)

_MIN_MEASURED_BYTES = 8 * 2**20  # less may all fit into the kernel's buffers
_LEAST_S = 1e-6
_INERTIA = 0.75  # of the measured rate, in octaves
_MAX_BALLOTS = 8  # of one peer at a time


class Paths:
    """The ways to the members of a peer's rounds. Create it inside a running event loop.

    Args:
        contact: how this peer takes part in direct links; its port and rate are found out here.
        is_required: whether a pair without a direct link fails, instead of using libp2p.
        credentials: for handshakes.
        run_id: name of the run.
        service: the way through libp2p.
        rounds: the rounds that this peer is in.
        part_timeout_s: longest silence of a groupmate.
        bucket: limit on the upload.
    """

    def __init__(
        self, contact: Contact, is_required: bool, credentials: Credentials, run_id: str, service: RoundService,
        rounds: RoundTable, part_timeout_s: float, bucket: TokenBucket | None,
    ) -> None:  # fmt: skip
        self.contact, self._is_required = contact, is_required
        if bucket is not None:  # no faster than that, and so in shorter parts from the first round on
            self.contact = replace(contact, rate=_code_of(bucket.bytes_per_s))
        self._service, self._rounds, self._part_timeout_s = service, rounds, part_timeout_s
        self._bucket, self._rate = bucket, None if bucket is None else bucket.bytes_per_s
        self._loop = asyncio.get_running_loop()
        self.links = DirectLinks(credentials, run_id, part_timeout_s, self._on_control, bucket)
        self._agreements = Agreements(self.links, service, is_required, part_timeout_s)
        self._answers: dict[tuple[bytes, PeerID], asyncio.Future[bytes]] = {}
        self._balloting: dict[PeerID, set[asyncio.Task[None]]] = {}
        service.on_declined = lambda group, peer_id: self._agreements.hear(group, peer_id, None)

    def listen(self, hosts: Sequence[str], port: int) -> None:
        """Begins to accept links; see :meth:`DirectLinks.listen`."""
        self.links.listen(hosts, port)
        self.contact = replace(self.contact, port=self.links.port)

    def channels(self, group: Group, me: int) -> dict[int, "PairChannel"]:
        """A channel to each other member; which way it takes is found out at once, beside everything else."""
        return {
            member: PairChannel(
                asyncio.create_task(self._choose_safely(group, me, member)), LibP2PChannel(self._service, group, member)
            )
            for member in range(len(group.peer_ids))
            if member != me
        }

    def leave(self, group: Group, channels: dict[int, "PairChannel"]) -> None:
        """A round is over."""
        links = []
        for member, channel in channels.items():
            link = channel.cancel()
            if link is not None:
                link.leave(group.name)
                links.append(link)
            self._answers.pop((group.name, group.peer_ids[member]), None)
            self._agreements.forget(group.name, group.peer_ids[member])
        self._measure(links)

    def _measure(self, links: Sequence[Link]) -> None:
        """Finds out how fast this peer sends, from what its links have sent since the last time."""
        taken = [link.outgoing.take_counts() for link in links]
        if sum(sent for sent, _ in taken) < _MIN_MEASURED_BYTES:
            return
        # Not the sum of the links' rates: who has the line for itself in the end would count as if it had it all along.
        rate = sum(sent for sent, _ in taken) / max(_LEAST_S, *(seconds for _, seconds in taken))
        # Smoothed: one round on a busy machine must not move slices from a peer to the others and back.
        self._rate = rate if self._rate is None else self._rate**_INERTIA * rate ** (1 - _INERTIA)
        if self._bucket is not None:
            self._rate = min(self._rate, self._bucket.bytes_per_s)
        self.contact = replace(self.contact, rate=_code_of(self._rate))

    async def stop(self) -> None:
        """Closes all links."""
        for tasks in self._balloting.values():
            for task in tasks:
                task.cancel()
        await self.links.stop()

    async def _choose_safely(self, group: Group, me: int, member: int) -> Channel:
        try:
            return await self._choose(group, me, member)
        except ExchangeError:
            raise
        except Exception as error:  # what a member says must not end the program; it is the likeliest cause
            logger.exception("cannot choose a way to a member")
            raise ExchangeError(f"no way to member {member}: {error}", [member]) from error

    async def _choose(self, group: Group, me: int, member: int) -> Channel:
        peer_id, theirs = group.peer_ids[member], group.offers[member].contact
        through_daemon = LibP2PChannel(self._service, group, member)
        hidden = [offer.bandwidth == 0 for offer in group.offers]
        link = None
        if theirs is not None and theirs.mode == self.contact.mode and not (hidden[me] and hidden[member]):
            # Who cannot be called proposes, because it alone can call the other to say that there is no link.
            proposes = hidden[me] if hidden[me] != hidden[member] else me < member
            pair = Pair(group.name, member, peer_id, theirs, self.contact, proposes, can_call=not hidden[member])
            link = await self._agreements.reach(pair)
        if link is not None:
            answer = self._answers[group.name, peer_id] = self._loop.create_future()
            return DirectChannel(
                self.contact.mode, link, group.name, member, answer, through_daemon, self._part_timeout_s
            )
        if self._is_required and not (hidden[me] and hidden[member]):
            raise ExchangeError(f"member {member} cannot be reached directly")
        return through_daemon

    def _on_control(self, link: Link, header: Header, payload: bytes) -> None:
        """On a link's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._handle, link, header, payload)

    def _handle(self, link: Link, header: Header, payload: bytes) -> None:
        if header.kind is Kind.USE:
            self._agreements.hear(header.group, link.peer_id, link)
        elif header.kind is Kind.ANSWER:
            answer = self._answers.get((header.group, link.peer_id))
            if answer is not None and not answer.done():
                answer.set_result(payload)
        elif header.kind is Kind.BALLOT:
            tasks = self._balloting.setdefault(link.peer_id, set())
            if len(tasks) < _MAX_BALLOTS:
                task = asyncio.create_task(self._answer_ballot(link, header.group, payload))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def _answer_ballot(self, link: Link, group: bytes, ballot: bytes) -> None:
        found = await self._rounds.find(group, link.peer_id)
        if found is None:
            return
        round_, member = found
        with contextlib.suppress(TimeoutError):
            link.say(Kind.ANSWER, group, await round_.answer_ballot(member, ballot))


def _code_of(bytes_per_s: float) -> int:
    """A rate as a :class:`Contact` tells it."""
    return min(255, max(1, round(4 * math.log2(max(2.0, bytes_per_s)))))
