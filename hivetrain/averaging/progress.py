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
from dataclasses import astuple, dataclass
from typing import Any

import msgpack
from hivemind.dht import DHT
from hivemind.utils import ValueWithExpiration, get_dht_time

logger = logging.getLogger(__name__)

MAX_RECORD_BYTES = 512
MAX_RECORDS = 4096
MAX_TTL_S = 3600.0
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
        waiting: whether it holds the global batch to be full and waits for the others.
        retired: whether it trains no more and only serves what it holds.
    """

    peer_id: str
    fingerprint: bytes
    epoch: int = 0
    samples: int = 0
    samples_per_s: float = 0.0
    digest: bytes = b""
    client_mode: bool = False
    waiting: bool = False
    retired: bool = False

    def to_bytes(self) -> bytes:
        return msgpack.packb(list(astuple(self)))

    @classmethod
    def from_bytes(cls, data: Any) -> "Progress":
        """Parses a record. Raises ValueError on anything that is not one."""
        if not isinstance(data, bytes) or len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"a record is at most {MAX_RECORD_BYTES} bytes")
        try:
            peer_id, fingerprint, epoch, samples, samples_per_s, digest, *flags = msgpack.unpackb(data)
            client_mode, waiting, retired = map(bool, flags)
        except Exception as error:  # msgpack raises a dozen types on garbage
            raise ValueError(f"not a progress record: {error}") from None
        if not isinstance(peer_id, str) or not isinstance(fingerprint, bytes) or not isinstance(digest, bytes):
            raise ValueError("a record's fields have other types")
        if type(epoch) is not int or type(samples) is not int or not 0 <= epoch < 2**53 or not 0 <= samples < 2**53:
            raise ValueError("a record's epoch or samples are out of range")
        if not isinstance(samples_per_s, float) or not 0 <= samples_per_s < 1e12:
            raise ValueError("a record's speed is out of range")
        return cls(peer_id, fingerprint, epoch, samples, samples_per_s, digest, client_mode, waiting, retired)


@dataclass(frozen=True)
class SwarmView:
    """The run as this peer sees it.

    Attributes:
        peers: live peers with the same settings, this one included; retired ones only if there is nobody else.
        strangers: live peers of the same run_id with other settings; their samples do not count.
        epoch: highest epoch that at least half of the peers have reached.
        digest: digest that most peers at ``epoch`` hold (ties: the smallest); b"" if none tells.
        max_samples: what one peer's samples count for at most.
    """

    peers: tuple[Progress, ...]
    strangers: tuple[Progress, ...]
    epoch: int
    digest: bytes
    max_samples: int

    @classmethod
    def of(cls, records: Iterable[Progress], fingerprint: bytes, max_samples: int) -> "SwarmView":
        """Draws the conclusions; a pure function of the records."""
        records = tuple(records)
        records = tuple(record for record in records if not record.retired) or records
        peers = tuple(record for record in records if record.fingerprint == fingerprint)
        strangers = tuple(record for record in records if record.fingerprint != fingerprint)
        epochs = sorted((peer.epoch for peer in peers), reverse=True)
        epoch = epochs[(len(epochs) + 1) // 2 - 1] if epochs else 0
        votes = Counter(peer.digest for peer in peers if peer.epoch == epoch and peer.digest)
        digest = min(votes, key=lambda d: (-votes[d], d), default=b"")
        return cls(peers, strangers, epoch, digest, max_samples)

    def samples(self, epoch: int) -> int:
        """Samples accumulated towards the end of ``epoch``, each peer's up to the cap."""
        return sum(min(peer.samples, self.max_samples) for peer in self.peers if peer.epoch == epoch)

    def is_full(self, epoch: int, target: int) -> bool:
        """Whether the global batch of ``epoch`` is full: by its samples, or because most peers hold it to be.

        Peers see each other's records at different times; without the second rule some would wait for the rest, who
        do not see why.
        """
        waiting = sum(peer.waiting for peer in self.peers if peer.epoch == epoch)
        return self.samples(epoch) >= target or 2 * waiting > len(self.peers)

    def group_target(self, epoch: int) -> int:
        """Peers to wait for at the end of ``epoch``.

        Records are a moment old, so a peer seen one epoch behind counts as here; one further behind is still joining.
        """
        return max(self.quorum, sum(peer.epoch >= epoch - 1 for peer in self.peers))

    @property
    def quorum(self) -> int:
        """The smallest majority of all live peers. Two parts of a swarm cannot both have one."""
        return len(self.peers) // 2 + 1


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
        self._others: dict[Any, tuple[Progress, float]] = {}
        self._as_of = 0.0  # DHT time at which the last reading began
        self._stores: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self.fetched_at = 0.0

    def report(self, own: Progress | None) -> None:
        """Sets the own record, None to take it back. Call it on the network loop's thread."""
        self._own = own
        self._changed.set()

    def view(self, own: Progress) -> SwarmView:
        """The swarm with ``own`` as this peer's latest record. Callable from any thread."""
        others = tuple(record for record, expires in self._others.values() if expires > self._as_of)
        records = (own, *others)
        return SwarmView.of(records, own.fingerprint, self._max_samples(len(records)))

    async def publish_forever(self) -> None:
        """Stores the own record whenever it changes, and often enough that it does not expire."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._ttl / 3)
            self._changed.clear()
            store = asyncio.create_task(self._store(b"" if self._own is None else self._own.to_bytes()))
            self._stores.add(store)
            store.add_done_callback(self._stores.discard)
            # A store waits seconds for every peer that fell silent. The next one does not wait for it that long: the
            # record would expire, and this peer seem gone because another one is.
            await asyncio.wait({store}, timeout=self._ttl / 6)
            await asyncio.sleep(_MIN_PERIOD_S)

    async def fetch_forever(self) -> None:
        """Reads all records again and again, more often the nearer the end of the epoch is."""
        while True:
            await self.fetch()
            await asyncio.sleep(self._period())

    async def fetch(self) -> None:
        """Reads all records once. Who was alive when the reading began is alive, however long it took."""
        began = get_dht_time()
        try:
            found = await asyncio.wait_for(self._dht.get(self._key, latest=True, return_future=True), self._ttl)
        except TimeoutError:
            logger.warning("the DHT did not answer within %.0f s; peers' progress is out of date", self._ttl)
            return  # which says nothing of who is alive: a peer that sees nobody is not alone therefore
        self._as_of = began
        value = found.value if isinstance(found, ValueWithExpiration) else None
        if isinstance(value, dict):
            self._merge(value)
        self.fetched_at = time.monotonic()

    async def withdraw(self) -> None:
        """Tells the others at once that this peer leaves."""
        self._own = None
        await self._store(b"")

    def _merge(self, entries: dict[Any, Any]) -> None:
        """Takes over what was read; what an incomplete answer of the DHT lacks stays until it expires."""
        known = {k: v for k, v in self._others.items() if v[1] > self._as_of}
        for subkey, entry in list(entries.items())[:MAX_RECORDS]:
            if subkey == self._subkey or not isinstance(entry, ValueWithExpiration):
                continue
            if entry.value == b"":
                known.pop(subkey, None)  # the peer took its record back
                continue
            if entry.expiration_time > get_dht_time() + MAX_TTL_S:
                logger.warning("ignored a peer's progress record: it claims to live for more than %.0f s", MAX_TTL_S)
                continue  # a peer that is gone would be waited for all that time
            try:
                known[subkey] = (Progress.from_bytes(entry.value), entry.expiration_time)
            except ValueError as error:
                logger.warning("ignored a peer's progress record: %s", error)
        own_id = self._own.peer_id if self._own else ""
        unique = {record.peer_id: subkey for subkey, (record, _) in known.items() if record.peer_id != own_id}
        self._others = {subkey: known[subkey] for subkey in unique.values()}

    def _period(self) -> float:
        if self._own is None:
            return _MAX_PERIOD_S
        view = self.view(self._own)
        speed = sum(peer.samples_per_s for peer in view.peers)
        if speed <= 0:
            return _MIN_PERIOD_S
        eta_s = max(0, self._target - view.samples(self._own.epoch)) / speed
        return min(_MAX_PERIOD_S, max(_MIN_PERIOD_S, eta_s / 4))

    async def _store(self, value: bytes) -> None:
        expires = get_dht_time() + self._ttl
        try:
            await asyncio.wait_for(
                self._dht.store(self._key, value, expires, subkey=self._subkey, return_future=True), self._ttl
            )
        except TimeoutError:
            logger.warning("the DHT did not store this peer's progress within %.0f s", self._ttl)
