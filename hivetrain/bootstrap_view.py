"""What a bootstrap's DHT peer says of itself, and which peers it has seen.

Surprising fact: the routing table forgets a peer that fails to answer once, and never counts one that only reads; so
the peers last seen are gathered from the table and the open connections, and kept for a while after they went.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import hivemind
from hivemind.dht import DHTNode

from hivetrain.swarm import DHTUnavailableError, SwarmDHT, run_in_dht, visible_maddrs

logger = logging.getLogger(__name__)

DHT_TIMEOUT_S = 2.0
SNAPSHOT_AGE_S = 2.0
MAX_SEEN = 64


@dataclass(frozen=True)
class PeerSnapshot:
    """What the DHT peer said of itself; ``fault`` is None unless it is dead or did not answer."""

    maddrs: tuple[str, ...]
    known_peers: int
    fault: str | None


@dataclass(frozen=True)
class Sighting:
    """One peer: when it was first and last connected or in the routing table, seconds since 1970."""

    peer_id: str
    first_seen: float
    last_seen: float


class Sightings:
    """The peers seen last, at most ``MAX_SEEN`` of them."""

    def __init__(self) -> None:
        self._seen: dict[str, Sighting] = {}

    def add(self, peer_ids: Collection[str], now: float) -> None:
        """Notes that these are there now."""
        for peer_id in peer_ids:
            before = self._seen.pop(peer_id, None)
            self._seen[peer_id] = Sighting(peer_id, before.first_seen if before else now, now)
        for peer_id in list(self._seen)[:-MAX_SEEN]:
            del self._seen[peer_id]

    def newest_first(self) -> list[Sighting]:
        return list(self._seen.values())[::-1]


class PeerView:
    """Asks the DHT peer for its state at most once in ``SNAPSHOT_AGE_S``, however many requests want to know.

    Args:
        dht: the running DHT peer.
        clock: monotonic seconds.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self, dht: SwarmDHT, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._dht, self._clock, self._wall_clock = dht, clock, wall_clock
        self._lock = threading.Lock()
        self._sightings = Sightings()
        self._snapshot = PeerSnapshot((), 0, "not asked yet")
        self._taken_at = float("-inf")

    def read(self) -> PeerSnapshot:
        with self._lock:
            if not self._dht.is_serving:
                return PeerSnapshot((), 0, "the DHT process or its p2pd has died")
            if self._clock() - self._taken_at >= SNAPSHOT_AGE_S:
                self._snapshot = self._ask()
                self._taken_at = self._clock()
            return self._snapshot

    def last_seen(self) -> list[Sighting]:
        """The peers seen last, newest first."""
        with self._lock:
            return self._sightings.newest_first()

    def _ask(self) -> PeerSnapshot:
        try:
            maddrs = visible_maddrs(self._dht, timeout_s=DHT_TIMEOUT_S)
            known, connected = run_in_dht(self._dht, _list_peers, timeout_s=DHT_TIMEOUT_S)
        except DHTUnavailableError as error:
            logger.warning("the DHT peer is unavailable: %s", error)
            return PeerSnapshot((), 0, str(error))
        self._sightings.add(sorted(known | connected), self._wall_clock())
        return PeerSnapshot(tuple(maddrs), len(known), None)


async def _list_peers(_dht: hivemind.DHT, node: DHTNode) -> tuple[set[str], set[str]]:
    """Peer ids in the routing table, and those of open connections."""
    known = {peer.to_base58() for peer in node.protocol.routing_table.peer_id_to_uid}
    return known, {peer.peer_id.to_base58() for peer in await node.p2p.list_peers()}
