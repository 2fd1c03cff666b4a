"""What the servers share: sockets, URLs, address files and their end."""

import os
import signal
import socket

import pytest

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
