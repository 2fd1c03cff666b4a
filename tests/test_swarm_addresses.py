import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hivetrain.swarm import (
    INITIAL_PEERS_ENV,
    SwarmJoinError,
    resolve_initial_peers,
)
from hivetrain.swarm.addresses import MAX_ANSWER_BYTES, MAX_ANSWER_PEERS, parse_answer

PEER_ID = "12D3KooWERA6naQ3663hGS7FwyZyaNQkecVMeidTvQnG3ww1QGF1"
PEER_A = f"/ip4/192.0.2.1/tcp/1111/p2p/{PEER_ID}"
PEER_B = f"/dns4/peer.example.org/tcp/2222/p2p/{PEER_ID}"
NOBODY = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def http_server(respond):
    """A server on loopback that lets ``respond(handler)`` answer every GET."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with_broken_pipe_ignored(respond, self)

        def log_message(self, *_args):
            pass

    def with_broken_pipe_ignored(function, handler):
        try:
            function(handler)
        except OSError:
            handler.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def answer(body, status=200, **headers):
    def respond(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def peers_json(*peers):
    return json.dumps({"initial_peers": list(peers)}).encode()


@pytest.fixture(autouse=True)
def _no_peers_from_the_environment(monkeypatch):
    monkeypatch.delenv(INITIAL_PEERS_ENV, raising=False)


# From what a user wrote to addresses


@pytest.mark.parametrize(
    "written",
    [[PEER_A, PEER_B], f"{PEER_A},{PEER_B}", f" {PEER_A} , {PEER_B} ,", [f"{PEER_A},{PEER_B}", PEER_A]],
)
def test_a_list_and_a_comma_string_mean_the_same(written):
    assert resolve_initial_peers(written) == [PEER_A, PEER_B]


def test_none_reads_the_environment_and_a_list_does_not(monkeypatch):
    assert resolve_initial_peers(None) == []
    monkeypatch.setenv(INITIAL_PEERS_ENV, f"{PEER_A},{PEER_B}")
    assert resolve_initial_peers(None) == [PEER_A, PEER_B]
    assert resolve_initial_peers([]) == []
    monkeypatch.setenv(INITIAL_PEERS_ENV, "nonsense")
    with pytest.raises(SwarmJoinError, match=rf"'nonsense' \(from {INITIAL_PEERS_ENV}\): not a multiaddr"):
        resolve_initial_peers(None)


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("127.0.0.1:8000", "not a multiaddr"),
        ("/ip4/192.0.2.1/tcp/1111", "the peer id is missing"),
        ("/ip4/192.0.2.1/tcp/99999/p2p/" + PEER_ID, "not a multiaddr"),
        ("/ip4/192.0.2.1/tcp/1111/p2p/xyz", "not a multiaddr"),
        ("/unix/tmp/socket", "not an internet address"),
        ("/p2p/" + PEER_ID, "not an internet address"),
        ("/dns4/" + "a" * 600 + "/tcp/1/p2p/" + PEER_ID, "longer than 512"),
    ],
)
def test_a_malformed_address_is_refused_by_name(written, complaint):
    with pytest.raises(SwarmJoinError, match=complaint) as caught:
        resolve_initial_peers([PEER_A, written])
    assert written[:100] in str(caught.value)


# Asking bootstrap servers


def test_bootstrap_urls_and_addresses_mix():
    with http_server(answer(peers_json(PEER_B))) as url:
        assert resolve_initial_peers([url]) == [PEER_B]
        assert resolve_initial_peers(f"{url}/return_dht_address,{PEER_A}") == [PEER_A, PEER_B]


def test_the_default_path_is_asked_without_following_redirects():
    asked = []

    def respond(handler):
        asked.append(handler.path)
        answer(b"", status=302, Location="/elsewhere")(handler)

    with http_server(respond) as url, pytest.raises(SwarmJoinError, match="HTTP status 302"):
        resolve_initial_peers(url + "/", timeout_s=5)
    assert asked == ["/return_dht_address"]


def test_one_living_bootstrap_of_three_is_enough_and_the_others_are_named(caplog):
    dead = f"http://127.0.0.1:{free_port()}"
    with http_server(answer(peers_json(PEER_A))) as living, http_server(answer(b"", status=404)) as wrong:
        assert resolve_initial_peers([dead, living, wrong], timeout_s=20) == [PEER_A]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{dead}: Connection refused" in record.getMessage()
    assert f"{wrong}: HTTP status 404" in record.getMessage()
    assert living not in record.getMessage()


def test_a_dead_bootstrap_does_not_stop_one_who_has_an_address():
    dead = f"http://127.0.0.1:{free_port()}"
    started_at = time.monotonic()
    assert resolve_initial_peers([dead, PEER_A], timeout_s=30) == [PEER_A]
    assert time.monotonic() - started_at < 5


def test_dead_bootstraps_are_all_named_with_their_reason_at_the_deadline():
    dead = f"http://user:secret@127.0.0.1:{free_port()}"
    started_at = time.monotonic()
    with http_server(answer(b"", status=500)) as broken, pytest.raises(SwarmJoinError) as caught:
        resolve_initial_peers([dead, broken, "http://[bad"], timeout_s=2)
    assert time.monotonic() - started_at < 4
    assert f"{dead.replace('user:secret@', '')}: Connection refused" in str(caught.value)
    assert f"{broken}: HTTP status 500" in str(caught.value)
    assert "malformed URL" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_bootstrap_that_is_still_starting_is_asked_again():
    replies = iter([answer(b"", status=503), answer(b"", status=503), answer(peers_json(PEER_A))])
    with http_server(lambda handler: next(replies)(handler)) as url:
        assert resolve_initial_peers(url, timeout_s=30) == [PEER_A]


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"1" * 50_000, "not JSON"),
        (json.dumps([PEER_A]).encode(), "answer is not"),
        (json.dumps({"initial_peers": PEER_A}).encode(), "answer is not"),
        (json.dumps({"initial_peers": [PEER_A, 7]}).encode(), "answer is not"),
        (json.dumps({"peers": [PEER_A]}).encode(), "answer is not"),
        (peers_json(), "0 peers"),
        (peers_json(*[PEER_A] * (MAX_ANSWER_PEERS + 1)), "65 peers"),
        (peers_json("/unix/tmp/x", "garbage", "", "/dns4/\x00\ud800/tcp/1/p2p/x", PEER_A[:-3]), "none of the 5"),
        (b" " * (MAX_ANSWER_BYTES + 1), "larger than 65536"),
    ],
)
def test_a_hostile_answer_is_refused(body, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_answer(body)


def test_unusable_addresses_in_an_answer_are_left_out():
    assert parse_answer(peers_json("/ip4/192.0.2.1/tcp/1111", PEER_A, "/ip4/192.0.2.1/sctp/1/p2p/" + PEER_ID)) == [
        PEER_A
    ]


def test_an_answer_of_10_mb_is_not_read():
    sent = []

    def respond(handler):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(160):
            handler.wfile.write(b" " * 65536)
            sent.append(65536)

    with http_server(respond) as url:
        with pytest.raises(SwarmJoinError, match="larger than 65536 bytes"):
            resolve_initial_peers(url, timeout_s=20)
        assert sum(sent) < 8_000_000, "the connection should have been closed early"


@pytest.mark.parametrize("drips", ["headers", "body"])
def test_a_slow_drip_ends_at_the_deadline(drips):
    done = threading.Event()

    def respond(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"X: " if drips == "headers" else b"\r\n"))
        while not done.wait(0.05):
            handler.wfile.write(b" ")

    started_at = time.monotonic()
    with http_server(respond) as url, pytest.raises(SwarmJoinError, match="no complete answer in time"):
        resolve_initial_peers(url, timeout_s=1.5)
    done.set()
    assert time.monotonic() - started_at < 3
