"""A node that accepts and never answers, the whole way down to sockets and threads."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import T

from hivetrain.chain.base import Code, LedgerError, Outcome
from hivetrain.chain.remote import RemoteChain
from hivetrain.keys import Hotkey

KEY = Hotkey.from_seed(b"\x21" * 32)
SERVER = Hotkey.from_seed(b"\x22" * 32).address
CYCLES = 1000


SILENT_NODE = """
import socket
listening = socket.create_server(("127.0.0.1", 0), backlog=512)
print(listening.getsockname()[1], flush=True)
connections = []
while True:
    connections.append(listening.accept()[0])
    print("accepted", flush=True)
    if len(connections) > 64:
        connections.pop(0).close()
"""
GREETING_NODE = """
import threading
from websockets.sync.server import serve
with serve(lambda connection: threading.Event().wait(), "127.0.0.1", 0) as server:
    print(server.socket.getsockname()[1], flush=True)
    server.serve_forever()
"""


@contextmanager
def silent_node(program=SILENT_NODE, accepted=None):
    """A process that accepts every connection and never answers; yields its port, tells in ``accepted`` how many."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()
            if accepted is not None:
                accepted.extend(process.stdout.readlines())


def remote(port):
    return RemoteChain(f"http://127.0.0.1:{port}", KEY, SERVER)


def bittensor(port):
    pytest.importorskip("bittensor")
    from hivetrain.chain.bittensor import BittensorChain

    return BittensorChain(f"ws://127.0.0.1:{port}", 1, KEY)


CALLS = {
    "snapshot": lambda chain, t: chain.snapshot(t),
    "register": lambda chain, t: chain.register(t),
    "publish": lambda chain, t: chain.publish("8.8.8.8", 80, t),
    "submit_weights": lambda chain, t: chain.submit_weights({KEY.address: 1.0}, 0, t),
    "wait_block": lambda chain, t: chain.wait_block(10, t),
    "block_hash": lambda chain, t: chain.block_hash(1, t),
    "weights": lambda chain, t: chain.weights(t),
}


@pytest.mark.parametrize("kind", [remote, bittensor])
def test_every_call_returns_within_its_deadline_plus_a_second(kind):
    with silent_node() as port:
        for name, call in CALLS.items():
            chain = kind(port)
            start = time.monotonic()
            assert outcome(call, chain) in (Outcome.UNKNOWN, Code.UNREACHABLE), name
            assert time.monotonic() - start < 1.2, name
            start = time.monotonic()
            chain.close()
            assert time.monotonic() - start < 2, name


def outcome(call, chain):
    try:
        return call(chain, 0.2).outcome
    except LedgerError as error:
        return error.code


def test_a_write_that_may_have_arrived_is_unknown_and_one_that_cannot_is_unreachable():
    with silent_node() as port:
        chain = remote(port)
        assert chain.submit_weights({KEY.address: 1.0}, 0, 0.2).outcome == Outcome.UNKNOWN
        chain.close()
    gone = remote(port)
    with pytest.raises(LedgerError) as caught:
        gone.submit_weights({KEY.address: 1.0}, 0, T)
    assert caught.value.code == Code.UNREACHABLE
    gone.close()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def settle(before, timeout_s=10):
    """Wait until files and threads are back at what they were; return what is left over."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        extra = open_files() - before[0], threading.active_count() - before[1]
        if max(extra) <= 0:
            return 0, 0
        time.sleep(0.01)
    return extra


def one_cycle(chain):
    with pytest.raises(LedgerError) as caught:
        chain.snapshot(0.005)
    assert caught.value.code == Code.UNREACHABLE


@pytest.mark.parametrize("kind", [remote, bittensor])
def test_a_thousand_deadlines_leave_no_socket_and_no_thread(kind, monkeypatch):
    if kind is bittensor:
        pytest.importorskip("bittensor")
        from hivetrain.chain import bittensor_session

        monkeypatch.setattr(bittensor_session, "BACKOFF_S", 0.0)
    accepted = []
    with silent_node(accepted=accepted) as port:
        first = kind(port)
        one_cycle(first)
        first.close()
        before = open_files(), threading.active_count()
        lasting = kind(port)
        for _ in range(CYCLES // 2):
            one_cycle(lasting)
        lasting.close()
        for _ in range(CYCLES // 2):
            chain = kind(port)
            one_cycle(chain)
            chain.close()
        assert settle(before) == (0, 0)
    assert len(accepted) > CYCLES / 2, "most calls ended before they reached the node"


def test_a_node_that_greets_and_then_is_silent_leaves_nothing_either(monkeypatch):
    pytest.importorskip("bittensor")
    from hivetrain.chain import bittensor_session

    monkeypatch.setattr(bittensor_session, "BACKOFF_S", 0.0)
    with silent_node(GREETING_NODE) as port:
        before = open_files(), threading.active_count()
        chain = bittensor(port)
        for _ in range(20):
            start = time.monotonic()
            with pytest.raises(LedgerError) as caught:
                chain.snapshot(0.1)
            assert caught.value.code == Code.UNREACHABLE
            assert time.monotonic() - start < 1.1
        chain.close()
        assert settle(before) == (0, 0)


PROGRAM = """
import sys
from hivetrain.chain import open_chain
from hivetrain.keys import Hotkey
chain = open_chain(sys.argv[1], Hotkey.throwaway())
print("waiting", flush=True)
try:
    chain.snapshot(600)
finally:
    chain.close()
"""


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "bittensor:ws://127.0.0.1:{}/1"])
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_waiting_process_ends_within_5_seconds_of_a_signal(form, ending):
    if "bittensor" in form:
        pytest.importorskip("bittensor")
    with silent_node() as port:
        program = [sys.executable, "-c", PROGRAM, form.format(port)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout.readline() == b"waiting\n"
            start = time.monotonic()
            process.send_signal(ending)
            process.wait(30)
            assert time.monotonic() - start < 5
            assert process.returncode != 0


REFUSING_NODE = """
import socket
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
while True:
    connection, _ = listening.accept()
    print("accepted", flush=True)
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 429 Too Many Requests\\r\\nRetry-After: 30\\r\\nContent-Length: 0\\r\\n\\r\\n")
    connection.close()
"""


def test_a_node_that_answers_429_is_left_alone_for_as_long_as_it_says():
    accepted = []
    with silent_node(REFUSING_NODE, accepted) as port:
        chain = bittensor(port)
        for _ in range(5):
            start = time.monotonic()
            with pytest.raises(LedgerError) as caught:
                chain.snapshot(T)
            assert caught.value.code == Code.UNREACHABLE
            assert time.monotonic() - start < 2
        assert "the next attempt is in" in caught.value.message
        chain.close()
    assert len(accepted) == 1


def test_a_port_nobody_listens_on_is_tried_until_the_deadline():
    chain = bittensor(1)
    start = time.monotonic()
    with pytest.raises(LedgerError) as caught:
        chain.snapshot(0.4)
    assert caught.value.code == Code.UNREACHABLE
    assert time.monotonic() - start < 1.4
    chain.close()
