"""Nobody can write another peer's record: not even through a node that signs nothing itself."""

import asyncio

import msgpack
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.validation import DHTRecord
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.contribution.record import Leaf, Reveal, RevealedLeaf, hotkey_subkey, seal
from hivetrain.keys import Hotkey
from hivetrain.swarm import start_dht, visible_maddrs
from hivetrain.swarm.records import MAX_LIFETIME_S, HotkeyRecords, read_records, store_record


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

    def store(value, expires, subkey=subkey):
        return node.store("run_reveal_3", value, expires, subkey=subkey)

    try:
        assert store(mine, expires)
        assert not store(stolen, expires + 5)  # by another hotkey
        assert not store(mine, expires + 10)  # nobody prolongs another's record
        assert not store(b"garbage", expires + 10)
        far = get_dht_time() + MAX_LIFETIME_S + 60
        assert not store(seal(reveal(owner), owner, far), far)
        assert store(b"no hotkey's", expires, subkey=b"other")
        for reader in (bootstrap, node):
            assert asyncio.run(read_records(reader, "run_reveal_3", 10)) == {subkey: (mine, expires)}
        assert asyncio.run(store_record(node, "run_reveal_4", subkey, mine, expires, 10))
        assert asyncio.run(store_record(node, "run_reveal_4", subkey, mine, expires, 10))  # it is there already
        assert not asyncio.run(store_record(node, "run_reveal_4", subkey, stolen, expires, 10))
        assert asyncio.run(read_records(node, "run_reveal_5", 10)) == {}
    finally:
        for dht in (node, bootstrap):
            dht.shutdown()


def test_a_huge_hotkey_record_is_refused_without_being_read():
    owner, expires = Hotkey.throwaway(), get_dht_time() + 60
    subkey = msgpack.packb(hotkey_subkey(owner.address))
    value = seal(reveal(owner), owner, expires)
    assert HotkeyRecords().validate(DHTRecord(b"key", subkey, msgpack.packb(value), expires))
    assert not HotkeyRecords().validate(DHTRecord(b"key", subkey, msgpack.packb(value + bytes(2**20)), expires))
    assert not HotkeyRecords().validate(DHTRecord(b"key", subkey, b"\xc1", expires))
    assert HotkeyRecords().validate(DHTRecord(b"key", b"\xc1", b"of somebody else", expires))


def reveal(hotkey):
    return Reveal("run", hotkey.address, 3, bytes(32), (RevealedLeaf(0, Leaf(0, 1.0, bytes(1024)), ()),))
