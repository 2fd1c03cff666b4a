"""Several bootstraps as one: each looks for the others, notices that the DHT has split, and joins it together again.

Surprising fact: two bootstraps that answer each other over HTTP can still hold two separate DHTs. So each publishes a
marker under its own key and looks for the others' markers through the DHT itself: what is not found there is split
off, however well the line works.
"""

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import hivemind
import requests
from hivemind.dht import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils import ValueWithExpiration, get_dht_time
from hivemind.utils.multiaddr import Multiaddr

from hivetrain.errors import UserError
from hivetrain.swarm import DHTUnavailableError, SwarmDHT, run_in_dht
from hivetrain.swarm.addresses import parse_answer, parse_maddr

logger = logging.getLogger(__name__)

MARKERS_KEY = "hivetrain_bootstraps"
MARKER_TTL_S = 60.0
MARKER_AGE_S = 20.0  # older ones are left from before a split: nodes keep records until they expire
LINK_PERIOD_S = 5.0
DHT_TIMEOUT_S = 8.0
HTTP_TIMEOUT_S = 3.0
MAX_OTHERS = 16
MAX_MARKERS = 4096
MAX_ANSWER_BYTES = 64 * 1024


class LinkState(StrEnum):
    """How one of the others was found at the last look."""

    LINKED = "linked"
    SPLIT = "split"  # it lives, but in a DHT of its own
    SILENT = "silent"  # it does not answer
    UNKNOWN = "unknown"  # not looked at yet


@dataclass(frozen=True)
class Link:
    """One of the others: where it was named, its peer id once known, how it was found and how often it was rejoined."""

    name: str
    peer_id: str | None = None
    state: LinkState = LinkState.UNKNOWN
    healed: int = 0

    @property
    def shown(self) -> str:
        """The name without the user name and password that a URL may hold."""
        scheme, separator, rest = self.name.partition("://")
        return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def marker_of(public_key: bytes) -> str:
    """The name of a bootstrap's marker, which nobody else can write: a digest of the key that protects it."""
    return hashlib.sha256(public_key).hexdigest()


class Links:
    """Watches the other bootstraps in a thread of its own.

    Args:
        dht: the running DHT peer.
        peer_id: its peer id.
        subkey: its protected subkey, under which its marker is written.
        others: URLs of other bootstraps, or multiaddrs of any peers of the swarm. A URL of this server is skipped.
        period_s: seconds from one look to the next.
        on_look: called before each look.

    Raises:
        UserError: one of them is malformed, or there are too many.
    """

    def __init__(
        self,
        dht: SwarmDHT,
        peer_id: str,
        subkey: bytes,
        others: Sequence[str],
        period_s: float = LINK_PERIOD_S,
        on_look: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_look = on_look
        self._dht, self._own_id, self._subkey, self._period_s = dht, peer_id, subkey, period_s
        self.marker = marker_of(subkey)
        self._links = {name: Link(name) for name in check_others(others)}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bootstrap-links", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        """Ends the thread; it may take part in one last call to the DHT."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def read(self) -> list[Link]:
        """How the others were found at the last look."""
        return [link for link in list(self._links.values()) if link.peer_id != self._own_id]

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._on_look()
                self._publish()
                markers = run_in_dht(self._dht, _find_markers, timeout_s=DHT_TIMEOUT_S)
                for link in self.read():
                    if self._stopped.is_set():
                        return
                    self._note(link, self._look(link, markers))
            except DHTUnavailableError as error:
                logger.warning("cannot look for the other bootstraps: %s", error)
            except Exception:  # the thread is what mends the swarm: it outlives whatever goes wrong once
                logger.exception("looking for the other bootstraps failed; trying again")
            self._stopped.wait(self._period_s)

    def _publish(self) -> None:
        run_in_dht(self._dht, partial(_store_marker, subkey=self._subkey), timeout_s=DHT_TIMEOUT_S)

    def _look(self, link: Link, markers: set[str]) -> Link:
        found = _ask_url(link.name) if _is_url(link.name) else _Found([link.name], None)
        if found is None:
            return Link(link.name, link.peer_id, LinkState.SILENT, link.healed)
        peer_id = found.maddrs[0].rpartition("/")[2]
        if peer_id == self._own_id:
            return Link(link.name, peer_id)
        joined = partial(_join, maddrs=found.maddrs)
        if found.marker is None:  # only an address: being in the routing table has to do
            linked = run_in_dht(self._dht, partial(_is_known, peer_id=peer_id), timeout_s=DHT_TIMEOUT_S)
        else:
            linked = found.marker in markers
        if linked:
            return Link(link.name, peer_id, LinkState.LINKED, link.healed)
        if not run_in_dht(self._dht, joined, timeout_s=DHT_TIMEOUT_S):
            state = LinkState.SILENT if found.marker is None else LinkState.SPLIT
            return Link(link.name, peer_id, state, link.healed)
        again = found.marker is None or found.marker in run_in_dht(self._dht, _find_markers, timeout_s=DHT_TIMEOUT_S)
        return Link(link.name, peer_id, LinkState.LINKED if again else LinkState.SPLIT, link.healed + again)

    def _note(self, before: Link, now: Link) -> None:
        self._links[now.name] = now
        if now.state == before.state and now.healed == before.healed:
            return
        if now.healed > before.healed:
            logger.info("joined the DHT of bootstrap %s with this one", now.shown)
        elif now.state == LinkState.SPLIT:
            logger.warning("the DHT is split: %s answers, but its marker is not found; joining again", now.shown)
        elif now.state == LinkState.SILENT:
            logger.warning("bootstrap %s does not answer; looking again every %g s", now.shown, self._period_s)
        else:
            logger.info("bootstrap %s is %s", now.shown, now.state)


def check_others(others: Sequence[str]) -> list[str]:
    """The others' names, each once and checked.

    Raises:
        UserError: one is malformed, or there are too many.
    """
    names = list(dict.fromkeys(part.strip() for entry in others for part in entry.split(",") if part.strip()))
    if len(names) > MAX_OTHERS:
        raise UserError(f"{len(names)} other bootstraps are too many: name {MAX_OTHERS} at most")
    for name in names:
        if not _is_url(name):
            try:
                parse_maddr(name, with_peer_id=True)
            except ValueError as error:
                raise UserError(f"initial peer {name[:200]!r}: {error}") from error
    return names


@dataclass(frozen=True)
class _Found:
    maddrs: list[str]
    marker: str | None


def _is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _ask_url(url: str) -> _Found | None:
    """Addresses and marker of the bootstrap at a URL; None if it does not give both."""
    base = url.rstrip("/").removesuffix("/return_dht_address")
    try:
        maddrs = parse_answer(_get(f"{base}/return_dht_address"))
        health = json.loads(_get(f"{base}/health"))
        marker = health.get("marker") if isinstance(health, dict) else None
    except (requests.RequestException, ValueError, RecursionError, OSError):
        return None
    return _Found(maddrs, marker if isinstance(marker, str) and len(marker) == 64 else None)


def _get(address: str) -> bytes:
    """A bounded body; ValueError for any status but 200."""
    with requests.get(address, timeout=HTTP_TIMEOUT_S, stream=True, allow_redirects=False) as response:
        if response.status_code != requests.codes.ok:
            raise ValueError(f"HTTP status {response.status_code}")
        deadline, body = time.monotonic() + HTTP_TIMEOUT_S, b""
        for chunk in response.iter_content(4096):
            body += chunk
            if len(body) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                raise ValueError("the answer is too long or too slow")
        return body


async def _store_marker(_dht: hivemind.DHT, node: DHTNode, subkey: bytes) -> bool:
    return await node.store(MARKERS_KEY, b"1", get_dht_time() + MARKER_TTL_S, subkey=subkey)


async def _find_markers(_dht: hivemind.DHT, node: DHTNode) -> set[str]:
    """The bootstraps' markers that the DHT holds and that were renewed of late."""
    found = await node.get(MARKERS_KEY, latest=True)
    entries = found.value if isinstance(found, ValueWithExpiration) and isinstance(found.value, dict) else {}
    fresh = get_dht_time() + MARKER_TTL_S - MARKER_AGE_S
    return {
        marker_of(subkey)
        for subkey, entry in list(entries.items())[:MAX_MARKERS]
        if isinstance(subkey, bytes) and isinstance(entry, ValueWithExpiration) and entry.expiration_time > fresh
    }


async def _is_known(_dht: hivemind.DHT, node: DHTNode, peer_id: str) -> bool:
    """Whether the peer answers a ping, which also puts it into the routing table."""
    peer = PeerID.from_base58(peer_id)
    known = peer in node.protocol.routing_table.peer_id_to_uid
    return known and await node.protocol.call_ping(peer) is not None


async def _join(_dht: hivemind.DHT, node: DHTNode, maddrs: Sequence[str]) -> bool:
    """Connects to a peer, exchanges places in the routing tables, and looks around from there."""
    peer = PeerID.from_base58(maddrs[0].rpartition("/")[2])
    addresses = [Multiaddr(maddr.rpartition("/p2p/")[0]) for maddr in maddrs]
    try:
        await asyncio.wait_for(node.p2p._client.connect(peer, addresses), 3.0)
    except Exception:  # p2pd reports every failure as one type of its own; a time-out is another
        return False
    if await node.protocol.call_ping(peer, validate=True, strict=False) is None:
        return False
    await node.find_nearest_nodes([node.node_id])
    return True
