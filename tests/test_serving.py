"""What the servers share: sockets, URLs, address files and their end."""

import asyncio
import http.client
import os
import select
import signal
import socket
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import uvicorn

from hivetrain import serving
from hivetrain.errors import UserError


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture
def handlers():
    kept = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in kept.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    ("host", "start"),
    [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:"), ("::", "http://[::1]:")],
)  # fmt: skip
def test_the_url_of_a_socket_works_on_this_machine(host, start):
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with serving.listen(host, 0) as listener:
        url = serving.url_of(listener)
        assert url == f"{start}{listener.getsockname()[1]}"
        socket.create_connection((url[7:].rpartition(":")[0].strip("[]"), listener.getsockname()[1]), 5).close()


def test_an_address_that_cannot_be_had_is_refused_with_its_reason():
    with serving.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use; pass"):
            serving.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen on 127.0.0.1 port 65536: "):
        serving.listen("127.0.0.1", 65536)
    with pytest.raises(UserError, match="cannot listen on not a host port 0: .*[Nn]ame"):
        serving.listen("not a host", 0)


def test_an_address_file_is_there_as_long_as_the_server_and_nothing_beside_it(tmp_path):
    path = tmp_path / "address"
    with serving.address_file(path, "http://here"):
        assert path.read_text() == "http://here"
        assert list(tmp_path.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == []


def test_an_address_file_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path, reason in (
        (tmp_path / "absent" / "address", "No such file or directory"),
        (tmp_path / "folder", "Is a directory"),
    ):
        with pytest.raises(UserError, match=f"cannot write the address file {path}: {reason}"):
            serving.address_file(path, "").__enter__()
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


@pytest.mark.parametrize(("signum", "raised"), [(signal.SIGTERM, None), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_block_and_none_disturbs_the_closing(handlers, signum, raised):
    closed = []

    def close():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        closed.append(True)

    def serve():
        with serving.until_signal() as opened:
            opened.callback(close)
            os.kill(os.getpid(), signum)
            pytest.fail("it went on")

    if raised is None:
        serve()
    else:
        with pytest.raises(raised):
            serve()
    assert closed == [True]


@contextmanager
def answering(max_connections, released):
    """A server whose ``/stream`` says one thing at once and another when it is released."""

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        if scope["path"] == "/stream":
            await send({"type": "http.response.body", "body": b"ab", "more_body": True})
            while not released.is_set():
                await asyncio.sleep(0.02)
            await send({"type": "http.response.body", "body": b"cd"})
        else:
            await send({"type": "http.response.body", "body": b"here"})

    with serving.listen("127.0.0.1", 0) as listener:
        server = uvicorn.Server(serving.http_config(app, max_connections))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            released.set()
            server.should_exit = True
            thread.join(10)


def wait_until_closed(client, drop=b""):
    """Reads what comes, and adds a drop whenever nothing does, until the server has closed the connection."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if not select.select([client], [], [], 0.05)[0]:
                client.sendall(drop)
            elif not client.recv(4096):
                return
        except ConnectionError:
            return
    pytest.fail("the connection is still open")


STARTS = (
    b"",
    b"GET / HTTP/1.1\r\nHost:",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\nab",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\nG",
    b"GET /stream HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n",
)


@pytest.mark.parametrize("drop", [b"", b"x"], ids=["silent", "dripping"])
def test_connections_without_a_complete_request_are_closed_and_make_room(monkeypatch, drop):
    monkeypatch.setattr(serving, "REQUEST_S", 0.5)
    with answering(len(STARTS), threading.Event()) as address, ExitStack() as opened:
        clients = [opened.enter_context(socket.create_connection(address, 5)) for _ in STARTS]
        for client, start in zip(clients, STARTS, strict=True):
            client.sendall(start)
        for client, start in zip(clients, STARTS, strict=True):
            wait_until_closed(client, drop if start else b"")
        honest = http.client.HTTPConnection(*address, timeout=5)
        opened.callback(honest.close)
        honest.request("GET", "/")
        assert honest.getresponse().read() == b"here"


def test_streams_and_connections_with_several_requests_are_left_alone(monkeypatch):
    monkeypatch.setattr(serving, "REQUEST_S", 0.5)
    released = threading.Event()
    with answering(8, released) as address, ExitStack() as opened:
        stream = http.client.HTTPConnection(*address, timeout=5)
        opened.callback(stream.close)
        stream.request("GET", "/")
        assert stream.getresponse().read() == b"here"
        kept = stream.sock
        stream.request("GET", "/stream")
        answer = stream.getresponse()
        assert answer.read(2) == b"ab"
        wait_until_closed(opened.enter_context(socket.create_connection(address, 5)))  # the time is up by now
        released.set()
        assert answer.read() == b"cd"
        stream.request("GET", "/")
        assert stream.getresponse().read() == b"here"
        assert stream.sock is kept


def test_a_request_that_ends_after_its_answer_gives_the_next_one_its_full_time(monkeypatch):
    monkeypatch.setattr(serving, "REQUEST_S", 2.0)
    with answering(8, threading.Event()) as address, socket.create_connection(address, 5) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        for rest in (b"ab", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            while select.select([client], [], [], 1.2)[0]:
                assert client.recv(4096), "closed too early"
            client.sendall(rest)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
