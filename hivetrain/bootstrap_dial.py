"""Dialling back: can the one who asks be reached from here?

Surprising fact: a server that connects wherever it is told is a port scanner for strangers. So only the address that
the request came from is dialled, an answer is "reached" only if that peer id proved itself there in libp2p's
handshake, and nothing is said of what else was found.
"""

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import hivemind
from hivemind.dht import DHTNode
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from hivetrain.swarm import SwarmDHT, run_in_dht

DIAL_TIMEOUT_S = 5.0
MAX_AT_ONCE = 4
MAX_PER_MINUTE = 60
PAUSE_PER_ADDRESS_S = 5.0
MAX_ADDRESSES = 4096
MIN_PORT = 1024
_PEER_ID_FORMS = {34: b"\x12\x20", 38: b"\x00\x24\x08\x01\x12\x20"}  # bytes: SHA-256 of a key, Ed25519 key


class DialRefused(Exception):
    """A request that is not dialled; ``status`` is HTTP's, the message is safe to return."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class DialTarget:
    """Where to dial: the requester's own address, checked."""

    host: str
    port: int
    peer_id: str

    @property
    def maddr(self) -> str:
        family = "ip6" if ":" in self.host else "ip4"
        return f"/{family}/{self.host}/tcp/{self.port}"


def parse_target(client_host: str, port: object, peer_id: object) -> DialTarget:
    """Check what a stranger asked for.

    Args:
        client_host: the address the request came from.
        port: from the request; untrusted.
        peer_id: from the request; untrusted.

    Raises:
        DialRefused: saying why.
    """
    if type(port) is not int or not MIN_PORT <= port <= 65535:
        raise DialRefused(422, f"port must be a whole number from {MIN_PORT} to 65535")
    try:
        if not isinstance(peer_id, str) or len(peer_id) > 128:
            raise ValueError
        checked = PeerID.from_base58(peer_id)
        if not checked.to_bytes().startswith(_PEER_ID_FORMS.get(len(checked.to_bytes()), b"-")):
            raise ValueError
    except Exception:  # the parser lets its codecs' exceptions through
        raise DialRefused(422, "peer_id is no libp2p peer id") from None
    try:
        address = ipaddress.ip_address(client_host)
    except ValueError:
        raise DialRefused(409, "the request does not come from an internet address") from None
    mapped = getattr(address, "ipv4_mapped", None)
    return DialTarget(str(mapped or address), port, checked.to_base58())


class DialLimits:
    """Bounds what all requesters together, and each address, may ask for."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._recent: list[float] = []
        self._running = 0

    @contextmanager
    def one(self, host: str) -> Iterator[None]:
        """Count one dial to ``host`` while it lasts.

        Raises:
            DialRefused: a limit is reached.
        """
        self._enter(host)
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def _enter(self, host: str) -> None:
        with self._lock:
            now = self._clock()
            self._recent = [at for at in self._recent if now - at < 60]
            if now - self._last.get(host, float("-inf")) < PAUSE_PER_ADDRESS_S:
                raise DialRefused(429, f"one dial per address in {PAUSE_PER_ADDRESS_S:g} s: ask again later")
            if self._running >= MAX_AT_ONCE or len(self._recent) >= MAX_PER_MINUTE:
                raise DialRefused(429, "too many dials at this moment: ask again later")
            self._last.pop(host, None)
            self._last[host] = now
            for oldest in list(self._last)[:-MAX_ADDRESSES]:
                del self._last[oldest]
            self._recent.append(now)
            self._running += 1


def dial_back(dht: SwarmDHT, target: DialTarget) -> bool:
    """Whether the peer answers at the target and proves to be who it says.

    Raises:
        DialRefused: it is connected already, so that dialling would prove nothing.
        DHTUnavailableError: the own DHT process does not answer.
    """
    outcome = run_in_dht(dht, partial(_dial, peer_id=target.peer_id, maddr=target.maddr), timeout_s=DIAL_TIMEOUT_S + 1)
    if outcome is None:
        raise DialRefused(409, "this peer is connected already: dial with a fresh peer id")
    return outcome


async def _dial(_dht: hivemind.DHT, node: DHTNode, peer_id: str, maddr: str) -> bool | None:
    """In the DHT process: None if the peer is connected already."""
    wanted = PeerID.from_base58(peer_id)
    client = node.p2p._client  # the public class has no way to dial
    if wanted == node.peer_id or any(peer.peer_id == wanted for peer in await client.list_peers()):
        return None
    try:
        await asyncio.wait_for(client.connect(wanted, [Multiaddr(maddr)]), DIAL_TIMEOUT_S)
    except Exception:  # p2pd reports every failure as one type of its own; a time-out is another
        return False
    reached = any(peer.peer_id == wanted and maddr in map(str, peer.addrs) for peer in await client.list_peers())
    with suppress(Exception):
        await client.disconnect(wanted)
    return reached
