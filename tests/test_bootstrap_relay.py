"""Two peers that nobody can dial talk through a bootstrap that is a relay."""

import time
from functools import partial

import pytest
from bootstrap_server import bootstrap
from hivemind.p2p import PeerID

from hivetrain.swarm import SwarmDHT, run_in_dht

RESERVATION_S = 300  # p2pd waits three minutes for better relays before it takes the only one that it knows


class CircuitThrough:
    """The multiaddr of whoever has a place at a relay, as p2pd reads it, which hivemind's own is not."""

    def __init__(self, maddr: str) -> None:
        _, _, host, _, port, _, relay = maddr.split("/")
        key = PeerID.from_base58(relay).to_bytes()
        address = bytes([4, *map(int, host.split(".")), 6]) + int(port).to_bytes(2, "big")
        self._bytes = address + b"\xa5\x03" + bytes([len(key)]) + key + b"\xa2\x02"

    def to_bytes(self) -> bytes:
        return self._bytes


async def connect(_dht, node, peer_id, maddr):
    try:
        await node.p2p._client.connect(PeerID.from_base58(peer_id), [CircuitThrough(maddr)])
    except Exception as error:
        return str(error)
    return "connected"


async def ping(_dht, node, peer_id):
    return await node.protocol.call_ping(PeerID.from_base58(peer_id)) is not None


async def addresses_of(_dht, node, peer_id):
    return [str(maddr) for peer in await node.p2p.list_peers() if str(peer.peer_id) == peer_id for maddr in peer.addrs]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_peers_that_listen_nowhere_talk_through_the_relay(tmp_path):
    with bootstrap(tmp_path, "--relay") as relay:
        (address,) = relay.initial_peers
        behind_nat = {"start": True, "no_listen": True, "force_reachability": "private"}
        hidden = SwarmDHT([address], use_auto_relay=True, ensure_bootstrap_success=False, **behind_nat)
        caller = SwarmDHT([address], client_mode=True, **behind_nat)
        try:
            peer_id, deadline = str(hidden.peer_id), time.monotonic() + RESERVATION_S
            assert not run_in_dht(caller, partial(ping, peer_id=peer_id), timeout_s=15)
            answer = ""
            while answer != "connected":
                assert time.monotonic() < deadline, answer
                time.sleep(5)
                answer = run_in_dht(caller, partial(connect, peer_id=peer_id, maddr=address), timeout_s=30)
            assert run_in_dht(caller, partial(ping, peer_id=peer_id), timeout_s=15)
            (through,) = run_in_dht(caller, partial(addresses_of, peer_id=peer_id), timeout_s=15)
            assert through.endswith("/p2p-circuit")
        finally:
            caller.shutdown()
            hidden.shutdown()
