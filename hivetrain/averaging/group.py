"""Finding the peers of one round: hivemind's matchmaking, and a pure rule for who may take part.

Every member sees the same offers (the leader relays them, the vote proves that it relayed the same to all), so every
member computes the same membership, weights and slices from them without another message.
"""

import asyncio
import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import msgpack
from hivemind.averaging.group_info import GroupInfo
from hivemind.averaging.key_manager import GroupKeyManager
from hivemind.averaging.matchmaking import Matchmaking
from hivemind.dht import DHT
from hivemind.p2p import P2P, PeerID, ServicerBase
from hivemind.proto import averaging_pb2
from hivemind.utils import get_dht_time

from hivetrain.averaging import layout
from hivetrain.averaging.direct.contact import Contact
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.report import Member

logger = logging.getLogger(__name__)

MAX_OFFER_BYTES = 512
MAX_MEMBERS = 1024
DIGEST_BYTES = 16
NONCE_BYTES = 8
MAX_COMMITMENT_BYTES = 32
GROUP_NAME_BYTES = 32
_MAX_SPEED = 16  # times the median, that a measured rate counts for at most
_EQUAL_RATES = 2  # quarters of a power of two: differences up to 41 % are noise
_MIN_PART_ELEMENTS = 2**12
_PART_S = 0.025  # a part should take about so long on its reducer's line


@dataclass(frozen=True)
class Offer:
    """What a peer brings to a round.

    Attributes:
        fingerprint: 16 bytes naming the run's settings (model shapes, target batch size, compression, …).
        epoch: swarm epoch that the peer wants to finish.
        digest: first 16 bytes of the digest of its params.
        samples: samples behind its gradient.
        bandwidth: relative bandwidth for the slices; 0 for a peer that cannot be reached (client mode).
        nonce: 8 random bytes, new for each attempt.
        commitment: up to 32 bytes to which the peer binds itself before all members; b"" for nothing.
        links: the peer's :class:`Contact`; b"" for a peer without direct links.
    """

    fingerprint: bytes
    epoch: int
    digest: bytes
    samples: int
    bandwidth: float
    nonce: bytes
    commitment: bytes = b""
    links: bytes = b""

    def to_bytes(self) -> bytes:
        return msgpack.packb(astuple(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Offer":
        """Parses an offer. Raises ValueError on anything that is not one."""
        if len(data) > MAX_OFFER_BYTES:
            raise ValueError(f"an offer has at most {MAX_OFFER_BYTES} bytes, got {len(data)}")
        try:
            fingerprint, epoch, digest, samples, bandwidth, nonce, commitment, links = msgpack.unpackb(data)
        except Exception as error:  # msgpack raises a dozen types on garbage
            raise ValueError(f"not an offer: {error}") from None
        typed = all(isinstance(field, bytes) for field in (fingerprint, digest, nonce, commitment, links))
        if not typed or not isinstance(bandwidth, float) or type(epoch) is not int or type(samples) is not int:
            raise ValueError("an offer's fields have other types")
        if len(fingerprint) != DIGEST_BYTES or len(digest) != DIGEST_BYTES or len(nonce) != NONCE_BYTES or epoch < 0:
            raise ValueError("an offer's fields are out of range")
        if not 0 < samples < 2**53 or not 0 <= bandwidth < 1e12:
            raise ValueError("an offer's samples or bandwidth are out of range")
        if len(commitment) > MAX_COMMITMENT_BYTES:
            raise ValueError("an offer's commitment is too long")
        if links:
            Contact.from_bytes(links)
        return cls(fingerprint, epoch, digest, samples, bandwidth, nonce, commitment, links)

    @property
    def contact(self) -> Contact | None:
        """How the peer takes part in direct links; None if it does not."""
        return Contact.from_bytes(self.links) if self.links else None

    @property
    def state(self) -> tuple[bytes, int, bytes]:
        """Peers may average only with peers of equal state."""
        return self.fingerprint, self.epoch, self.digest

    @property
    def state_name(self) -> str:
        """A short name of the state, for keys."""
        return hashlib.sha256(msgpack.packb(self.state)).hexdigest()[:16]


@dataclass(frozen=True)
class Group:
    """The members of one round, in the same order on every member.

    Attributes:
        name: names the round: a hash of members and offers. hivemind's own group id is drawn from ``random``, so
            peers that seed alike use the same ones again and again.
        peer_ids: members.
        offers: one offer for each member.
        left_out: peers that matchmaking found but whose state differs, with the reason.
    """

    name: bytes
    peer_ids: tuple[PeerID, ...]
    offers: tuple[Offer, ...]
    left_out: dict[PeerID, str]

    @classmethod
    def from_matchmaking(cls, info: GroupInfo) -> "Group":
        """Keeps the largest set of peers that agree on run, epoch and params (ties: higher epoch, smaller digest)."""
        offers: dict[PeerID, Offer] = {}
        left_out: dict[PeerID, str] = {}
        for peer_id, data in list(zip(info.peer_ids, info.gathered, strict=True))[:MAX_MEMBERS]:
            try:
                offers[peer_id] = Offer.from_bytes(data)
            except ValueError as error:
                left_out[peer_id] = str(error)
        votes = Counter(offer.state for offer in offers.values())
        state = max(votes, key=lambda s: (votes[s], s[1], bytes(255 - byte for byte in s[2])), default=None)
        members = tuple(peer_id for peer_id, offer in offers.items() if offer.state == state)
        for peer_id, offer in offers.items():
            if state is not None and offer.state != state:
                left_out[peer_id] = difference(offer, state)
        name = hashlib.sha256(info.group_id)
        for peer_id in members:
            name.update(peer_id.to_bytes())
            name.update(offers[peer_id].to_bytes())
        return cls(name.digest(), members, tuple(offers[peer_id] for peer_id in members), left_out)

    def weights(self, max_samples: int) -> tuple[float, ...]:
        """Averaging weights: each member's samples, none above ``max_samples``."""
        return tuple(float(min(offer.samples, max_samples)) for offer in self.offers)

    def members(self, max_samples: int) -> tuple[Member, ...]:
        """Who takes part, with what."""
        weights = self.weights(max_samples)
        return tuple(
            Member(str(peer_id), offer.samples, weight, offer.commitment)
            for peer_id, offer, weight in zip(self.peer_ids, self.offers, weights, strict=True)
        )

    def slices(self, numel: int) -> tuple[int, ...]:
        """Elements that each member reduces, in proportion to its bandwidth; all zero if no member can be reached.

        Integer arithmetic, so that every member computes the same (hivemind's load balancing breaks ties at random).
        """
        shares = [round(o.bandwidth * speed * 1000) for o, speed in zip(self.offers, self._speeds(), strict=True)]
        total, ends = sum(shares), [0]
        for index in range(len(shares)):
            ends.append(numel * sum(shares[: index + 1]) // total if total else 0)
        return tuple(stop - start for start, stop in itertools.pairwise(ends))

    def layout(self, numel: int) -> Layout:
        """Who reduces what, in parts that are shorter where the reducer's line is slow."""
        rates = [offer.contact.rate if offer.contact else 0 for offer in self.offers]
        parts = [_part_elements(rate) if rate else layout.PART_ELEMENTS for rate in rates]
        return Layout.split(numel, self.slices(numel), parts)

    def _speeds(self) -> list[float]:
        """How much faster than most each member has found its line to be; 1 where that is unknown of somebody."""
        rates = [offer.contact.rate if offer.contact else 0 for offer in self.offers if offer.bandwidth]
        if not rates or not all(rates):
            return [1.0] * len(self.offers)
        median = sorted(rates)[(len(rates) - 1) // 2]
        differences = [(offer.contact.rate if offer.contact else 0) - median for offer in self.offers]
        speeds = [1.0 if abs(d) <= _EQUAL_RATES else 2.0 ** int(d / 4) for d in differences]
        return [min(float(_MAX_SPEED), max(1 / _MAX_SPEED, speed)) for speed in speeds]


def _part_elements(rate: int) -> int:
    """A power of two: what a line of that rate (see :class:`Contact`) sends in a moment, within limits."""
    elements = 2.0 ** (rate / 4) * _PART_S / 4
    return int(min(layout.PART_ELEMENTS, max(_MIN_PART_ELEMENTS, 2 ** int(math.log2(max(1.0, elements))))))


def difference(offer: Offer, state: tuple[bytes, int, bytes]) -> str:
    """Says in what ``offer`` differs from the state of the others."""
    fingerprint, epoch, _ = state
    if offer.fingerprint != fingerprint:
        return "its run settings differ"
    if offer.epoch != epoch:
        return f"it is at swarm epoch {offer.epoch}, the group is at {epoch}"
    return f"its params differ from the group's at swarm epoch {epoch}"


@dataclass
class _Search:
    """What hivemind's Matchmaking reads of a step: when it wants to begin, when to give up, what to gather."""

    scheduled_time: float
    deadline: float
    data_for_gather: bytes

    def get_timeout(self) -> float:
        return max(0.0, self.deadline - get_dht_time())


class _Keys(GroupKeyManager):
    """Sees no peers that are avoided."""

    def __init__(self, dht: DHT, prefix: str, avoided: Callable[[], frozenset[str]]) -> None:
        super().__init__(dht, prefix, "", None)
        self._avoided = avoided

    async def get_averagers(self, group_key: str, only_active: bool) -> list[tuple[PeerID, float]]:
        found = await super().get_averagers(group_key, only_active)
        return [(peer_id, expires) for peer_id, expires in found if str(peer_id) not in self._avoided()]


class Matchmaker:
    """hivemind's matchmaking with a group size that may change from round to round.

    Args:
        servicer_type: the class whose ``rpc_join_group`` forwards to :meth:`answer`.
        matchmaking_time_s: how long a round waits for peers that have not come yet.
    """

    def __init__(
        self, p2p: P2P, dht: DHT, servicer_type: type[ServicerBase], prefix: str, schema: bytes,
        matchmaking_time_s: float, client_mode: bool,
    ) -> None:  # fmt: skip
        self._prefix, self._matchmaking_time_s = prefix, matchmaking_time_s
        self._one_search = asyncio.Lock()
        self._looking: asyncio.Task[GroupInfo | None] | None = None
        self._matchmaking = Matchmaking(
            p2p,
            schema,
            dht,
            servicer_type=servicer_type,
            prefix=prefix,
            target_group_size=None,
            min_group_size=2,
            min_matchmaking_time=matchmaking_time_s,
            request_timeout=matchmaking_time_s / 4,  # more leads to deadlocks of peers that wait for each other
            client_mode=client_mode,
        )
        self.avoided: frozenset[str] = frozenset()
        self._matchmaking.group_key_manager = _Keys(dht, prefix, lambda: self.avoided)

    async def find(self, offer: Offer, target: int, quorum: int, timeout_s: float) -> Group | None:
        """Looks for a group of ``target`` peers, or of at least ``quorum`` when matchmaking time is over.

        Returns None if there is none within ``timeout_s``.
        """
        async with self._one_search:
            if self._looking is not None:  # the search before this one may still be taking its leave of the DHT
                await asyncio.wait({self._looking}, timeout=timeout_s)
                if not self._looking.done():
                    return None
            return await self._find(offer, target, quorum, timeout_s)

    async def _find(self, offer: Offer, target: int, quorum: int, timeout_s: float) -> Group | None:
        search = self._matchmaking
        search.group_key_manager.prefix = f"{self._prefix}_{offer.state_name}"  # others of another state never meet us
        search.target_group_size = search.potential_leaders.target_group_size = target
        search.min_group_size = max(2, quorum)
        now = get_dht_time()
        step = _Search(now + self._matchmaking_time_s, now + timeout_s, offer.to_bytes())
        assembled = search.assembled_group
        self._looking = looking = asyncio.create_task(search.look_for_group(step))
        looking.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            # Not the search itself: it ends seconds after its result where the DHT waits for a silent peer.
            waiting: set[asyncio.Future[Any]] = {looking, assembled}
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not assembled.done():
                looking.cancel()
        if not assembled.done() or assembled.cancelled():
            return None
        if (error := assembled.exception()) is not None:  # of any type: what a peer sent may be anything
            logger.info("matchmaking failed: %r", error)
            return None
        return Group.from_matchmaking(assembled.result())

    def accepts(self, request: averaging_pb2.JoinRequest, peer_id: PeerID) -> bool:
        """Whether a request to join is within limits, and of somebody who is not avoided."""
        if str(peer_id) in self.avoided:
            return False
        return len(request.gather) <= MAX_OFFER_BYTES and len(request.schema_hash) <= 64

    @property
    def answer(self):  # type: ignore[no-untyped-def]  # hivemind's own signature
        """Serves ``rpc_join_group``."""
        return self._matchmaking.rpc_join_group
