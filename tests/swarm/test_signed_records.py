"""Nobody can write another peer's record: not even through a node that signs nothing itself."""

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.swarm import start_dht, visible_maddrs


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
