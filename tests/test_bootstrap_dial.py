"""Dialling back: useful to whoever asks about itself, useless for anything else."""

import socket

import pytest
import requests
from bootstrap_server import bootstrap

from hivetrain.bootstrap_dial import MAX_AT_ONCE, DialLimits, DialRefused, parse_target
from hivetrain.swarm import start_dht, visible_maddrs

PEER_ID = "12D3KooWERA6naQ3663hGS7FwyZyaNQkecVMeidTvQnG3ww1QGF1"


class Clock:
    now = 1000.0

    def __call__(self):
        self.now += 6.0
        return self.now


def ask(server, headers=None, **params):
    return requests.post(f"{server.url}/dial_back", params=params, headers=headers, timeout=15)


def test_a_peer_is_reached_only_where_it_proves_its_peer_id(tmp_path):
    peer = start_dht([])
    port = int(visible_maddrs(peer)[0].split("/")[4])
    try:
        for wanted, reachable in ((str(peer.peer_id), True), (PEER_ID, False)):
            with bootstrap(tmp_path) as server:  # a fresh one: an address may ask once in 5 s
                answer = ask(server, port=port, peer_id=wanted)
                assert (answer.status_code, answer.json()["reachable"]) == (200, reachable)
                assert answer.json()["address"] == f"/ip4/127.0.0.1/tcp/{port}"
                again = ask(server, port=port, peer_id=wanted)
                assert (again.status_code, "reachable" in again.json()) == (429, False)
    finally:
        peer.shutdown()


def test_what_is_refused_touches_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener, bootstrap(tmp_path) as server:
        port = listener.getsockname()[1]
        listener.settimeout(0)
        proxied = ask(server, {"X-Forwarded-For": "192.0.2.1"}, port=port, peer_id=PEER_ID)
        assert proxied.status_code == 409
        for bad in ({"port": 22}, {"port": "x"}, {"port": 70000}, {"peer_id": "nobody"}, {"peer_id": ""}):
            assert ask(server, **{"port": port, "peer_id": PEER_ID} | bad).status_code == 422
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_the_address_dialled_is_the_one_that_asked():
    assert parse_target("::ffff:192.0.2.7", 31337, PEER_ID).maddr == "/ip4/192.0.2.7/tcp/31337"
    assert parse_target("2001:db8::1", 31337, PEER_ID).maddr == "/ip6/2001:db8::1/tcp/31337"
    with pytest.raises(DialRefused):
        parse_target("testclient", 31337, PEER_ID)


def test_dials_are_limited_per_address_at_once_and_per_minute():
    limits = DialLimits(lambda: 0.0)
    with limits.one("192.0.2.1"), pytest.raises(DialRefused, match="one dial per address"), limits.one("192.0.2.1"):
        pass
    busy = [limits.one(f"192.0.2.{n}") for n in range(10, 10 + MAX_AT_ONCE)]
    for dial in busy:
        dial.__enter__()
    with pytest.raises(DialRefused, match="too many"), limits.one("192.0.2.99"):
        pass
    busy[0].__exit__(None, None, None)
    with limits.one("192.0.2.99"):
        pass
    slow = DialLimits(Clock())
    for _ in range(20):
        with slow.one("192.0.2.1"):
            pass
