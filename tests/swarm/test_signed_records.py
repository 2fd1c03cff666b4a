"""Nobody can write, move or hide another's record: not even through a node that signs nothing itself."""

import asyncio
import math
from dataclasses import replace

import msgpack
import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.contribution.record import (
    Contribution,
    Leaf,
    Position,
    Reveal,
    RevealedLeaf,
    hotkey_subkey,
    reveal_key,
    seal,
    work_key,
)
from hivetrain.keys import Hotkey
from hivetrain.swarm import start_dht, visible_maddrs
from hivetrain.swarm.dht import run_in_dht
from hivetrain.swarm.records import MAX_LIFETIME_S, MAX_RECORDS, HotkeyRecords, read_records, store_record

WORK, REVEALS = work_key("run", 3), reveal_key("run", 3)
LATE_S = MAX_LIFETIME_S + 700  # the cap moves in steps of 600 s


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of a DHT, and a stranger's."""
    first = start_dht([])
    others = [start_dht(visible_maddrs(first)) for _ in range(2)]
    yield first, *others
    for node in (*others, first):
        node.shutdown()


def test_a_record_is_accepted_from_its_owner_only():
    bootstrap = start_dht([])
    addresses = visible_maddrs(bootstrap)
    owner_key = RSASignatureValidator(RSAPrivateKey())
    owner = start_dht(addresses, record_validators=(owner_key,))
    thief = start_dht(addresses)
    try:
        subkey, expires = owner_key.local_public_key, get_dht_time() + 60
        assert owner.store("run_progress", b"mine", expires, subkey=subkey)
        assert not thief.store("run_progress", b"stolen", expires + 60, subkey=subkey)
        for node in (bootstrap, owner, thief):
            assert node.get("run_progress", latest=True).value[subkey].value == b"mine"
    finally:
        for node in (thief, owner, bootstrap):
            node.shutdown()


def test_a_hotkey_record_is_accepted_from_its_hotkey_only_and_until_its_own_time():
    bootstrap = start_dht([])
    node = start_dht(visible_maddrs(bootstrap), record_validators=())
    owner, thief = Hotkey.throwaway(), Hotkey.throwaway()
    subkey, expires = hotkey_subkey(owner.address), get_dht_time() + 60
    mine, stolen = seal(reveal(owner), owner, expires), seal(reveal(thief), thief, expires + 5)
    later = seal(reveal(owner, 4), owner, expires)

    def store(value, expires, subkey=subkey):
        return node.store("run_reveal_3", value, expires, subkey=subkey)

    try:
        assert store(mine, expires)
        assert not store(stolen, expires + 5)  # by another hotkey
        assert not store(mine, expires + 10)  # nobody prolongs another's record
        assert not store(b"garbage", expires + 10)
        far = get_dht_time() + LATE_S
        assert not store(seal(reveal(owner), owner, far), far)
        assert store(b"no hotkey's", expires, subkey=b"other")
        for reader in (bootstrap, node):
            assert asyncio.run(read_records(reader, "run_reveal_3", 10)) == {subkey: (mine, expires)}
        assert asyncio.run(store_record(node, "run_reveal_4", subkey, later, expires, 10))
        assert asyncio.run(store_record(node, "run_reveal_4", subkey, later, expires, 10))  # it is there already
        assert not asyncio.run(store_record(node, "run_reveal_4", subkey, stolen, expires, 10))
        assert asyncio.run(read_records(node, "run_reveal_5", 10)) == {}
    finally:
        for dht in (node, bootstrap):
            dht.shutdown()


def test_a_huge_hotkey_record_is_refused_without_being_read():
    owner, expires = Hotkey.throwaway(), get_dht_time() + 60
    subkey = msgpack.packb(hotkey_subkey(owner.address))
    value, key = seal(reveal(owner), owner, expires), key_bytes(REVEALS)
    assert HotkeyRecords().validate(DHTRecord(key, subkey, msgpack.packb(value), expires))
    assert not HotkeyRecords().validate(DHTRecord(key, subkey, msgpack.packb(value + bytes(2**20)), expires))
    assert not HotkeyRecords().validate(DHTRecord(key, subkey, b"\xc1", expires))


def test_a_record_lies_under_its_own_key_alone():
    owner, expires = Hotkey.throwaway(), get_dht_time() + 60
    subkey = msgpack.packb(hotkey_subkey(owner.address))
    elsewhere = [work_key("run", 2), work_key("run", 4), work_key("other", 3), reveal_key("other", 3), "run_scores_3"]
    for record, own, others in (
        (contribution(owner), WORK, [REVEALS, *elsewhere]),
        (reveal(owner), REVEALS, [WORK, *elsewhere]),
    ):
        found = DHTRecord(key_bytes(own), subkey, msgpack.packb(seal(record, owner, expires)), expires)
        assert HotkeyRecords().validate(found)
        for key in others:
            assert not HotkeyRecords().validate(replace(found, key=key_bytes(key)))


def test_a_contribution_cannot_take_the_place_of_a_reveal(nodes):
    first, second, stranger = nodes
    owner, expires = Hotkey.throwaway(), get_dht_time() + 60
    subkey, mine = hotkey_subkey(owner.address), seal(reveal(owner), owner, expires)
    work = seal(contribution(owner), owner, expires + 30)
    assert asyncio.run(store_record(first, REVEALS, subkey, mine, expires, 10))
    assert not asyncio.run(store_record(stranger, REVEALS, subkey, work, expires + 30, 10))
    for node in (first, second):
        assert asyncio.run(read_records(node, REVEALS, 10, {subkey}))[subkey] == (mine, expires)


def test_a_plain_value_hides_no_records(nodes):
    first, second, stranger = nodes
    key, owner, expires = reveal_key("run", 5), Hotkey.throwaway(), get_dht_time() + 60
    subkey, mine = hotkey_subkey(owner.address), seal(reveal(owner, 5), owner, expires)
    assert not stranger.store(key, b"plain", get_dht_time() + 3600)
    assert run_in_dht(stranger, _send_plain, timeout_s=10) == [False, False]
    assert asyncio.run(store_record(first, key, subkey, mine, expires, 10))
    for node in nodes:
        assert asyncio.run(read_records(node, key, 10)) == {subkey: (mine, expires)}


def test_a_value_that_cannot_be_unpacked_hides_no_records(nodes):
    first, second, stranger = nodes
    key, owner, expires = reveal_key("run", 6), Hotkey.throwaway(), get_dht_time() + 60
    subkey, mine = hotkey_subkey(owner.address), seal(reveal(owner, 6), owner, expires)
    assert asyncio.run(store_record(first, key, subkey, mine, expires, 10))
    assert run_in_dht(stranger, _send_garbage, timeout_s=10) == [False, False]
    for node in nodes:
        assert asyncio.run(read_records(node, key, 10)) == {subkey: (mine, expires)}


def test_nobody_stores_what_expires_too_late_or_never(nodes):
    now = get_dht_time()
    entry = DHTRecord(key_bytes("key"), msgpack.packb(b"anybody's"), msgpack.packb(b"value"), now + MAX_LIFETIME_S)
    assert HotkeyRecords().validate(entry)
    for expires in (now + LATE_S, math.inf, math.nan):
        assert not HotkeyRecords().validate(replace(entry, expiration_time=expires))
    for subkey in (None, 5, "text", [b"list"]):
        assert not HotkeyRecords().validate(replace(entry, subkey=msgpack.packb(subkey)))
    assert not nodes[2].store("foreign", b"value", now + LATE_S, subkey=b"anybody's")
    assert nodes[2].store("foreign", b"value", now + MAX_LIFETIME_S, subkey=b"anybody's")


def test_the_latest_expiration_is_the_same_for_clocks_that_differ_a_little(monkeypatch):
    def accepts(clock):
        monkeypatch.setattr("hivetrain.swarm.records.get_dht_time", lambda: clock)
        return HotkeyRecords().validate(entry)

    entry = DHTRecord(key_bytes("key"), msgpack.packb(b"a"), msgpack.packb(b"v"), 60_300.0 + MAX_LIFETIME_S)
    assert [accepts(clock) for clock in (60_000.0, 60_299.0, 60_301.0, 59_400.0)] == [True, True, True, False]


def test_entries_of_strangers_hide_no_record_however_many(nodes):
    first, second, stranger = nodes
    key, expires = work_key("run", 7), get_dht_time() + 60
    assert run_in_dht(stranger, _send_many, timeout_s=30) > MAX_RECORDS
    records = {}
    for hotkey in (Hotkey.throwaway(), Hotkey.throwaway()):
        subkey, sealed = hotkey_subkey(hotkey.address), seal(contribution(hotkey, 7), hotkey, expires)
        assert asyncio.run(store_record(first, key, subkey, sealed, expires, 10))
        records[subkey] = sealed, expires
    for node in (first, second):
        assert asyncio.run(read_records(node, key, 30)) == records
        assert asyncio.run(read_records(node, key, 30, {subkey})) == {subkey: records[subkey]}


async def _send_plain(_dht, node):
    return await _send(node, reveal_key("run", 5), [None], [msgpack.packb(b"plain")])


async def _send_garbage(_dht, node):
    return await _send(node, reveal_key("run", 6), [b"garbage"], [b"\xc1"])


async def _send_many(_dht, node):
    stored = await _send(node, work_key("run", 7), [b"%d" % i for i in range(5000)], [msgpack.packb(b"")] * 5000)
    return sum(stored) // len(node.protocol.routing_table.peer_id_to_uid)


async def _send(node, key, subkeys, values):
    """Asks all other nodes to store values under the key, past the own node's checks; returns what they say."""
    keys, expires = [DHTID.generate(source=key)] * len(values), get_dht_time() + 3600
    found = []
    for peer in node.protocol.routing_table.peer_id_to_uid:
        found += await node.protocol.call_store(peer, keys, values, [expires] * len(values), subkeys=subkeys)
    return found


def key_bytes(key):
    return DHTID.generate(source=key).to_bytes()


def reveal(hotkey, swarm_epoch=3):
    return Reveal("run", hotkey.address, swarm_epoch, bytes(32), (RevealedLeaf(0, Leaf(0, 1.0, bytes(1024)), ()),))


def contribution(hotkey, swarm_epoch=3):
    first, last = Position(0, 0, 0, 0), Position(0, 0, 0, 8)
    return Contribution(
        "run", hotkey.address, "peer", swarm_epoch, "0" * 64, bytes(16), 9, first, last, 2, 8, 16, 16, bytes(1024),
        bytes(32), "32-true",
    )  # fmt: skip
