"""What the nodes of a DHT let in, above all the records of a hotkey: only those that it signed for this place and time.

The surprising fact: the signature is not made here. A record is sealed by whoever holds the key, DHT key and expiration
included, so no private key enters the DHT's process, and nobody can prolong another's record, or move it.
"""

import asyncio
from collections.abc import Callable, Collection

from hivemind.dht import DHT
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer, ValueWithExpiration, get_dht_time

from hivetrain.contribution.record import MAX_REVEAL_BYTES, RecordError, hotkey_subkey, sealed_by

MAX_LIFETIME_S = 6 * 3600.0
MAX_RECORDS = 4096
_MAX_VALUE_BYTES = MAX_REVEAL_BYTES + 16
_STEP_S = 600.0
_MARK = hotkey_subkey("")


class HotkeyRecords(RecordValidatorBase):
    """Checks every record that somebody stores or finds.

    hivemind gives up a key for as long as it holds a plain value, and an answer as a whole for one entry in it that
    cannot be unpacked. Whoever wrote one of these could hide all others, so they are refused, hotkey or not.
    """

    def validate(self, record: DHTRecord) -> bool:
        """Whether it is an entry that can be read and expires in time, and a hotkey's is sealed by it for its place."""
        if len(record.value) > _MAX_VALUE_BYTES or not record.expiration_time <= _latest_expiration():
            return False
        try:
            subkey, value = MSGPackSerializer.loads(record.subkey), MSGPackSerializer.loads(record.value)
        except Exception:  # msgpack raises a dozen types on garbage
            return False
        if type(subkey) is not bytes:
            return False
        return not _is_hotkeys(subkey) or _is_sealed(record, subkey, value)

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
            return (await read_entries(dht, key, timeout_s, {subkey}.__contains__)).get(subkey) == value
    except TimeoutError:
        return False


async def read_records(
    dht: DHT, key: str, timeout_s: float, wanted: Collection[bytes] | None = None
) -> dict[bytes, tuple[bytes, float]]:
    """The records under a key that carry their hotkey's seal: subkey -> (sealed record, expiration).

    Args:
        dht: a node.
        key: where they lie.
        timeout_s: limit for the question.
        wanted: subkeys that count; None: any hotkey's, where it is not known who is registered.

    Raises:
        TimeoutError: the DHT does not answer.
    """
    is_wanted = _is_hotkeys if wanted is None else wanted.__contains__
    records: dict[bytes, tuple[bytes, float]] = {}
    for subkey, entry in (await read_entries(dht, key, timeout_s, is_wanted)).items():
        try:
            hotkey, place, expires = sealed_by(entry)
        except RecordError:
            continue
        if (subkey, key) == (hotkey_subkey(hotkey), place):
            records[subkey] = (entry, expires)
    return records


async def read_entries(
    dht: DHT, key: str, timeout_s: float, is_wanted: Callable[[bytes], bool] = lambda _: True
) -> dict[bytes, bytes]:
    """Entries under a key whose subkeys are wanted, whoever wrote them; their contents are to be distrusted.

    Raises:
        TimeoutError: the DHT does not answer.
    """
    found = await asyncio.wait_for(dht.get(key, latest=True, return_future=True), timeout_s)
    entries = found.value if isinstance(found, ValueWithExpiration) and isinstance(found.value, dict) else {}
    named = [item for item in entries.items() if isinstance(item[0], bytes) and is_wanted(item[0])]
    return {
        subkey: entry.value
        for subkey, entry in named[:MAX_RECORDS]
        if isinstance(entry, ValueWithExpiration) and isinstance(entry.value, bytes)
    }


def _is_hotkeys(subkey: bytes) -> bool:
    return subkey.startswith(_MARK)


def _is_sealed(record: DHTRecord, subkey: bytes, value: object) -> bool:
    try:
        hotkey, key, expires = sealed_by(value)
    except RecordError:
        return False
    place = hotkey_subkey(hotkey), DHTID.generate(source=key).to_bytes(), expires
    return place == (subkey, record.key, record.expiration_time)


def _latest_expiration() -> float:
    """Moves in steps: hivemind drops a whole answer for one entry that the asking node, its clock behind, refuses."""
    return (get_dht_time() // _STEP_S + 1) * _STEP_S + MAX_LIFETIME_S
