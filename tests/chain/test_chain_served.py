"""A served ledger among hostile clients and servers."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
from conftest import T, soon

from hivetrain.chain import wire
from hivetrain.chain.base import Code, LedgerError, Outcome
from hivetrain.chain.remote import RemoteChain
from hivetrain.keys import Hotkey, Wallet, sign_request

KEY = Hotkey.from_seed(b"\x31" * 32)


def post(url, server, call="snapshot", body=b"{}", key=KEY, path=None, **changes):
    path = path or f"/v1/{call}"
    facts = {"method": "POST", "path": path, "body": body, "receiver": server}
    return requests.post(url + path, data=body, headers=sign_request(key, **(facts | changes)), timeout=T)


@pytest.fixture
def served(remote_subnet):
    url = remote_subnet.server.url
    server = requests.get(url + "/v1/hotkey", timeout=T).json()["hotkey"]
    return remote_subnet, url, server


def test_an_honest_request_is_served(served):
    _, url, server = served
    assert post(url, server).json()["block"] == 1


def test_requests_signed_for_something_else_are_refused(served):
    _, url, server = served
    right = {"method": "POST", "path": "/v1/snapshot", "body": b"{}", "receiver": server}
    for wrong in (
        {"receiver": KEY.address},
        {"path": "/v1/weights"},
        {"method": "GET"},
        {"body": b"{ }"},
        {"nonce_ns": 1},
    ):
        answer = requests.post(url + "/v1/snapshot", data=b"{}", headers=sign_request(KEY, **right | wrong), timeout=T)
        assert answer.status_code == 401, wrong
        assert set(answer.json()) == {"refused"}


def test_stale_requests_and_those_from_the_future_are_refused(served):
    _, url, server = served
    for shift_s in (-11, 3):
        answer = post(url, server, nonce_ns=time.time_ns() + shift_s * 10**9)
        assert answer.status_code == 401
        assert "stale" in answer.json()["refused"]


def test_unsigned_requests_are_refused(served):
    _, url, _ = served
    assert requests.post(url + "/v1/snapshot", data=b"{}", timeout=T).status_code == 401


def test_a_query_is_part_of_what_is_signed(served):
    _, url, server = served
    headers = sign_request(KEY, method="POST", path="/v1/snapshot", body=b"{}", receiver=server)
    assert requests.post(url + "/v1/snapshot?x=1", data=b"{}", headers=headers, timeout=T).status_code == 401


def test_an_unregistered_hotkey_cannot_write(served):
    _, url, server = served
    body = wire.dumps({"weights": [[KEY.address, 1.0]], "version_key": 0})
    answer = post(url, server, "submit_weights", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_registered")
    answer = post(url, server, "publish", b'{"ip": "8.8.8.8", "port": 80}')
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_registered")


UNFIT_PAIRS = [
    [["X", float("nan")]],
    [[KEY.address, 1.0], [KEY.address, 1.0]],
    [[KEY.address, -1]],
    [[KEY.address]],
    [[1, 2]],
    [[KEY.address, {}]],
    [[KEY.address, 10**400]],
    ["ab"],
    [],
]


def test_a_client_that_checks_nothing_is_checked_by_the_server(served):
    subnet, url, server = served
    subnet.operator.register(KEY.address, soon())
    for pairs in UNFIT_PAIRS:
        body = json.dumps({"weights": pairs, "version_key": 0}).encode()
        answer = post(url, server, "submit_weights", body)
        assert answer.status_code in (400, 409), pairs
    assert subnet.operator.weights(soon()) == {}


MALFORMED_BODIES = [
    b"",
    b"[]",
    b"nonsense",
    b'{"block": NaN}',
    b'{"block": 1, "block": 2}',
    b'{"block": true}',
    b"[" * 100_000,
    b'{"block":' + b"[" * 100_000,
    b'{"block": ' + b"9" * 5000 + b"}",
    b"\xff\xfe",
]


def test_malformed_bodies_are_refused(served):
    _, url, server = served
    for body in MALFORMED_BODIES:
        assert post(url, server, "block_hash", body).status_code == 400, body[:20]


def test_huge_numbers_and_unknown_calls_are_answered_calmly(served):
    _, url, server = served
    assert post(url, server, "block_hash", b'{"block": 99999999999999999999}').json() == {"hash": None}
    assert post(url, server, "block_hash", b'{"block": -1}').json() == {"hash": None}
    assert post(url, server, "shutdown").status_code == 404
    big = json.dumps({"weights": [[KEY.address, 1.0]], "version_key": 10**30}).encode()
    assert post(url, server, "submit_weights", big).status_code in (400, 403)
    assert post(url, server).status_code == 200


def test_a_body_over_the_limit_is_refused_unread(served):
    _, url, server = served
    assert post(url, server, body=b" " * (wire.REQUEST_LIMIT + 1)).status_code == 413


def test_a_replayed_request_is_refused(served):
    _, url, server = served
    headers = sign_request(KEY, method="POST", path="/v1/register", body=b"{}", receiver=server)
    answers = [requests.post(url + "/v1/register", data=b"{}", headers=headers, timeout=T) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 401]


@contextmanager
def server_process(path):
    """``hivetrain ledger --serve`` in a process of its own; yields its URL and hotkey."""
    program = [sys.executable, "-m", "hivetrain.cli", "ledger", "--serve", str(path), "--port", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving .* at (http://\S+)#(\w+)\n", line)
            assert found, line + process.stderr.read()
            wait_until_served(found[1])
            yield found[1], found[2], process
        finally:
            process.terminate()
            process.wait(10)


def wait_until_served(url):
    end = time.monotonic() + 20
    while True:
        try:
            requests.get(url + "/v1/hotkey", timeout=1)
            return
        except requests.ConnectionError:
            assert time.monotonic() < end, "the server did not come up"


def test_a_request_accepted_by_one_server_process_is_refused_by_another(local_subnet):
    with (
        server_process(local_subnet.path) as (first, key, one),
        server_process(local_subnet.path) as (second, same, two),
    ):
        assert key == same
        headers = sign_request(KEY, method="POST", path="/v1/snapshot", body=b"{}", receiver=key)
        assert requests.post(first + "/v1/snapshot", data=b"{}", headers=headers, timeout=T).status_code == 200
        assert requests.post(second + "/v1/snapshot", data=b"{}", headers=headers, timeout=T).status_code == 401
        start = time.monotonic()
        for process in (one, two):
            process.terminate()
        for process in (one, two):
            process.wait(10)
        assert time.monotonic() - start < 10


def test_old_nonces_are_forgotten(local_subnet):
    ledger = local_subnet.operator
    assert ledger.accept_nonce(KEY.address, 1, 10**18, soon())
    assert not ledger.accept_nonce(KEY.address, 1, 10**18, soon())
    assert not ledger.accept_nonce(KEY.address, 1, 10**18 + 12 * 10**9, soon())
    assert ledger.accept_nonce(KEY.address, 1, 10**18 + 60 * 10**9, soon())


def test_a_pinned_server_hotkey_is_never_asked_for(served):
    subnet, url, server = served
    other = RemoteChain(url, KEY, KEY.address)
    with pytest.raises(LedgerError, match="another server"):
        other.snapshot(T)
    other.close()
    pinned = RemoteChain(url, KEY, server)
    assert pinned.snapshot(T).block == 1
    pinned.close()


def test_a_client_with_a_wrong_clock_learns_why(served):
    _, url, server = served
    with RemoteChain(url, KEY, server, now_ns=lambda: time.time_ns() - 60 * 10**9) as chain:
        with pytest.raises(LedgerError, match="stale") as caught:
            chain.snapshot(T)
        assert caught.value.code == Code.UNREACHABLE


@contextmanager
def strange_server(status, body, header=None):
    """Answers every request with the same bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(status)
            if header:
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>"),
        (200, b"{}"),
        (200, b"[]"),
        (200, b'{"block": 1, "block_hash": "0x", "next_epoch": 2, "rules": {}, "neurons": []}'),
        (200, b'{"block": "1", "block_hash": "0x", "next_epoch": 2, "rules": null, "neurons": [1]}'),
        (409, b'{"error": {"code": "made_up", "message": "", "retry_after_blocks": null}}'),
        (409, b'{"error": {"code": 3}}'),
        (500, b"oops"),
        (302, b"{}"),
        (200, b" " * (wire.RESPONSE_LIMIT + 10)),
    ],
)
def test_a_server_that_speaks_otherwise_is_incompatible(status, body):
    with (
        strange_server(status, body, ("Location", "http://192.0.2.1/")) as url,
        RemoteChain(url, KEY, KEY.address) as chain,
    ):
        with pytest.raises(LedgerError) as caught:
            chain.snapshot(T)
        assert caught.value.code == Code.INCOMPATIBLE


def test_an_overloaded_server_is_unreachable():
    with strange_server(503, b"{}") as url, RemoteChain(url, KEY, KEY.address) as chain:
        with pytest.raises(LedgerError) as caught:
            chain.snapshot(T)
        assert caught.value.code == Code.UNREACHABLE


def test_a_server_that_hangs_up_on_a_write_leaves_it_unknown():
    listening = socket.create_server(("127.0.0.1", 0))

    def hang_up():
        connection, _ = listening.accept()
        connection.recv(1 << 16)
        connection.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with RemoteChain(f"http://127.0.0.1:{listening.getsockname()[1]}", KEY, KEY.address) as chain:
        assert chain.submit_weights({KEY.address: 1.0}, 0, T).outcome == Outcome.UNKNOWN
    thread.join()
    listening.close()


def test_the_server_s_key_is_private_and_stays_the_same(local_subnet):
    with server_process(local_subnet.path) as (_, first, _process):
        pass
    with server_process(local_subnet.path) as (_, second, _process):
        pass
    assert first == second
    wallet = Wallet(f"{local_subnet.path.name}.wallet", "server", str(local_subnet.path.parent))
    assert wallet.hotkey_file.stat().st_mode & 0o777 == 0o600
