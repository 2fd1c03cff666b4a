"""Records that belong to a hotkey: every node of the DHT refuses one that its hotkey did not sign.

The surprising fact: the signature is not made here. A record is sealed by whoever holds the key, its expiration
included, so no private key enters the DHT's process, and nobody can prolong another's record.
"""

import asyncio

import msgpack
from hivemind.dht import DHT
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import ValueWithExpiration, get_dht_time

from hivetrain.contribution.record import MAX_REVEAL_BYTES, RecordError, hotkey_subkey, sealed_by

MAX_LIFETIME_S = 6 * 3600.0
MAX_RECORDS = 4096
_MARK = hotkey_subkey("")


class HotkeyRecords(RecordValidatorBase):
    """Checks records whose subkey names a hotkey; others are none of its business."""

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record is sealed by the hotkey that its subkey names, until the time at which it expires."""
        try:
            subkey = msgpack.unpackb(record.subkey) if record.subkey else None
        except Exception:  # msgpack raises a dozen types on garbage
            return True  # not a subkey of ours
        if not isinstance(subkey, bytes) or not subkey.startswith(_MARK):
            return True
        if len(record.value) > MAX_REVEAL_BYTES + 16 or record.expiration_time > get_dht_time() + MAX_LIFETIME_S:
            return False
        try:
            hotkey, expires = sealed_by(msgpack.unpackb(record.value))
        except Exception:  # RecordError, or one of msgpack's
            return False
        return subkey == hotkey_subkey(hotkey) and expires == record.expiration_time

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """One of a kind is enough."""
        return isinstance(other, HotkeyRecords)


async def store_record(dht: DHT, key: str, subkey: bytes, value: bytes, expires: float, timeout_s: float) -> bool:
    """Stores a sealed record; returns whether some node took it in time."""
    try:
        async with asyncio.timeout(timeout_s):
            if await dht.store(key, value, expires, subkey=subkey, return_future=True):
                return True
            # hivemind passes on what the last node answered, and one that was given the record before says no.
            return (await read_entries(dht, key, timeout_s)).get(subkey) == value
    except TimeoutError:
        return False


async def read_records(dht: DHT, key: str, timeout_s: float) -> dict[bytes, tuple[bytes, float]]:
    """All records under a key that carry their hotkey's seal: subkey -> (sealed record, expiration).

    Raises:
        TimeoutError: the DHT does not answer.
    """
    records: dict[bytes, tuple[bytes, float]] = {}
    for subkey, entry in (await read_entries(dht, key, timeout_s)).items():
        try:
            hotkey, expires = sealed_by(entry)
        except RecordError:
            continue
        if subkey == hotkey_subkey(hotkey):
            records[subkey] = (entry, expires)
    return records


async def read_entries(dht: DHT, key: str, timeout_s: float) -> dict[bytes, bytes]:
    """All entries under a key, by subkey, whoever wrote them; their contents are to be distrusted.

    Raises:
        TimeoutError: the DHT does not answer.
    """
    found = await asyncio.wait_for(dht.get(key, latest=True, return_future=True), timeout_s)
    entries = found.value if isinstance(found, ValueWithExpiration) and isinstance(found.value, dict) else {}
    return {
        subkey: entry.value
        for subkey, entry in list(entries.items())[:MAX_RECORDS]
        if isinstance(subkey, bytes) and isinstance(entry, ValueWithExpiration) and isinstance(entry.value, bytes)
    }
