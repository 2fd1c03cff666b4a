"""What the peers of a run say about themselves in the DHT, and what follows from it.

Each peer signs one short record under its own subkey. Claims are taken with care: samples count up to a cap, and the
epoch of the run is the highest that at least half of the live peers have reached, so one liar cannot move it.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgpack
from hivemind.dht import DHT
from hivemind.utils import ValueWithExpiration, get_dht_time

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 512
MAX_RECORDS = 4096
_MIN_PERIOD_S, _MAX_PERIOD_S = 0.15, 2.0


@dataclass(frozen=True)
class Progress:
    """One peer's record.

    Attributes:
        peer_id: libp2p identity, base58.
        fingerprint: 16 bytes naming the run's settings.
        epoch: finished global updates.
        samples: samples accumulated since.
        samples_per_s: the peer's own estimate of its speed.
        digest: first 16 bytes of the digest of its params.
        client_mode: whether it cannot be dialled.
    """

    peer_id: str
    fingerprint: bytes
    epoch: int = 0
    samples: int = 0
    samples_per_s: float = 0.0
    digest: bytes = b""
    client_mode: bool = False

    def to_bytes(self) -> bytes:
        return msgpack.packb(
            [self.peer_id, self.fingerprint, self.epoch, self.samples, self.samples_per_s, self.digest,
             self.client_mode]
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: Any) -> "Progress":
        """Parses a record. Raises ValueError on anything that is not one."""
        if not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"a record is at most {MAX_RECORD_BYTES} bytes")
        try:
            peer_id, fingerprint, epoch, samples, samples_per_s, digest, client_mode = msgpack.unpackb(data)
        except Exception as error:  # msgpack raises a dozen types on garbage
            raise ValueError(f"not a progress record: {error}") from None
        if not isinstance(peer_id, str) or not isinstance(fingerprint, bytes) or not isinstance(digest, bytes):
            raise ValueError("a record's fields have other types")
        if type(epoch) is not int or type(samples) is not int or not 0 <= epoch < 2**53 or not 0 <= samples < 2**53:
            raise ValueError("a record's epoch or samples are out of range")
        if not isinstance(samples_per_s, float) or not 0 <= samples_per_s < 1e12:
            raise ValueError("a record's speed is out of range")
        return cls(peer_id, fingerprint, epoch, samples, samples_per_s, digest, bool(client_mode))


@dataclass(frozen=True)
class SwarmView:
    """The run as this peer sees it.

    Attributes:
        peers: live peers with the same settings, this one included.
        strangers: live peers of the same run_id with other settings; their samples do not count.
        epoch: highest epoch that at least half of the peers have reached.
        digest: digest that most peers at ``epoch`` hold (ties: the smallest); b"" if none tells.
        samples: samples accumulated at ``epoch``, each peer's up to the cap.
    """

    peers: tuple[Progress, ...]
    strangers: tuple[Progress, ...]
    epoch: int
    digest: bytes
    samples: int

    @classmethod
    def of(cls, records: Iterable[Progress], fingerprint: bytes, max_samples: int) -> "SwarmView":
        """Draws the conclusions; a pure function of the records."""
        records = tuple(records)
        peers = tuple(record for record in records if record.fingerprint == fingerprint)
        epochs = sorted((peer.epoch for peer in peers), reverse=True)
        epoch = epochs[(len(epochs) + 1) // 2 - 1] if epochs else 0
        here = [peer for peer in peers if peer.epoch == epoch]
        votes = Counter(peer.digest for peer in here if peer.digest)
        digest = min(votes, key=lambda d: (-votes[d], d), default=b"")
        samples = sum(min(peer.samples, max_samples) for peer in here)
        return cls(peers, tuple(r for r in records if r.fingerprint != fingerprint), epoch, digest, samples)

    def at_epoch(self, epoch: int) -> int:
        """Number of live peers at ``epoch``."""
        return sum(peer.epoch == epoch for peer in self.peers)


class ProgressBoard:
    """Publishes the own record and reads the others', in the background of a network loop.

    Args:
        dht: a running DHT node that signs records under ``subkey``.
        key: DHT key of the run's records.
        subkey: this peer's protected subkey.
        record_ttl_s: how long a record of a peer that fell silent counts.
        max_samples: cap on any peer's samples, given the number of live peers.
    """

    def __init__(
        self, dht: DHT, key: str, subkey: bytes, record_ttl_s: float, target: int, max_samples: Callable[[int], int]
    ) -> None:
        self._dht, self._key, self._subkey, self._ttl = dht, key, subkey, record_ttl_s
        self._target, self._max_samples = target, max_samples
        self._own: Progress | None = None
        self._others: tuple[Progress, ...] = ()
        self._changed = asyncio.Event()
        self.fetched_at = 0.0

    def report(self, own: Progress) -> None:
        """Sets the own record. Call it on the network loop's thread."""
        self._own = own
        self._changed.set()

    def view(self, own: Progress) -> SwarmView:
        """The swarm with ``own`` as this peer's latest record. Callable from any thread."""
        records = (own, *self._others)
        return SwarmView.of(records, own.fingerprint, self._max_samples(len(records)))

    async def publish_forever(self) -> None:
        """Stores the own record whenever it changes, and often enough that it does not expire."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._ttl / 3)
            self._changed.clear()
            if self._own is not None:
                await self._store(self._own.to_bytes(), self._ttl)
            await asyncio.sleep(_MIN_PERIOD_S)

    async def fetch_forever(self) -> None:
        """Reads all records again and again, more often the nearer the end of the epoch is."""
        while True:
            await self.fetch()
            await asyncio.sleep(self._period())

    async def fetch(self) -> None:
        """Reads all records once."""
        try:
            found = await asyncio.wait_for(self._dht.get(self._key, latest=True, return_future=True), self._ttl)
        except TimeoutError:
            logger.warning("the DHT did not answer within %.0f s; peers' progress is out of date", self._ttl)
            return
        value = found.value if isinstance(found, ValueWithExpiration) else None
        self._others = tuple(self._parse(value)) if isinstance(value, dict) else ()
        self.fetched_at = time.monotonic()

    async def withdraw(self) -> None:
        """Tells the others at once that this peer leaves."""
        self._own = None
        await self._store(b"", self._ttl)

    def _parse(self, entries: dict[Any, Any]) -> Iterable[Progress]:
        seen = {self._own.peer_id if self._own else ""}
        for subkey, entry in list(entries.items())[:MAX_RECORDS]:
            if subkey == self._subkey or not isinstance(entry, ValueWithExpiration) or entry.value == b"":
                continue
            try:
                record = Progress.from_bytes(entry.value)
            except ValueError as error:
                logger.debug("ignored a progress record: %s", error)
                continue
            if record.peer_id not in seen:
                seen.add(record.peer_id)
                yield record

    def _period(self) -> float:
        if self._own is None:
            return _MAX_PERIOD_S
        view = self.view(self._own)
        speed = sum(peer.samples_per_s for peer in view.peers)
        if speed <= 0:
            return _MIN_PERIOD_S
        eta_s = max(0, self._target - view.samples) / speed
        return min(_MAX_PERIOD_S, max(_MIN_PERIOD_S, eta_s / 4))

    async def _store(self, value: bytes, ttl_s: float) -> None:
        stored = self._dht.store(
            self._key, value, get_dht_time() + ttl_s, subkey=self._subkey, return_future=True
        )  # fmt: skip
        try:
            await asyncio.wait_for(stored, self._ttl)
        except TimeoutError:
            logger.warning("the DHT did not store this peer's progress within %.0f s", self._ttl)
