import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest
import requests

from hivetrain.swarm import INITIAL_PEERS_ENV, count_known_peers, resolve_initial_peers, start_dht
from hivetrain.swarm.processes import is_running

START_TIMEOUT_S = 60


def wait_until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Server:
    """A bootstrap server in a process group of its own."""

    def __init__(self, folder, *options):
        self.address_file = folder / "address.json"
        command = [sys.executable, "-m", "hivetrain.cli", "bootstrap", "--port", "0"]
        command += ["--identity-path", str(folder / "bootstrap.id"), "--address-file", str(self.address_file), *options]
        self.stale = self.read_address()
        self.process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)

    def wait_until_ready(self):
        wait_until(self.listens_or_ended, START_TIMEOUT_S, "it listens")
        assert self.process.poll() is None, self.process.stderr.read()
        address = json.loads(self.read_address())
        self.url, self.initial_peers, self.peer_id = address["url"], address["initial_peers"], address["peer_id"]
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def listens_or_ended(self):
        return self.process.poll() is not None or self.read_address() not in (None, self.stale)

    def read_address(self):
        try:
            return self.address_file.read_text()
        except FileNotFoundError:
            return None

    def get(self, path):
        return requests.get(self.url + path, timeout=10)

    def end(self, send, within_s=10):
        started_at = time.monotonic()
        send()
        self.process.wait(within_s)
        wait_until(lambda: not any(map(is_running, self.children)), 5, "no child left")
        assert time.monotonic() - started_at < within_s
        return self.process.returncode


@contextmanager
def bootstrap(folder, *options):
    server = Server(folder, *options)
    try:
        yield server.wait_until_ready()
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        server.process.stderr.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with bootstrap(tmp_path_factory.mktemp("bootstrap")) as running:
        yield running


def test_it_answers_with_its_address(server):
    response = server.get("/return_dht_address")
    assert response.status_code == 200
    assert response.json() == {"initial_peers": server.initial_peers}
    (address,) = server.initial_peers
    assert address.startswith("/ip4/127.0.0.1/tcp/")
    assert address.endswith(f"/p2p/{server.peer_id}")


def test_peers_join_through_its_url_and_its_health_counts_them(server, monkeypatch):
    before = server.get("/health").json()
    monkeypatch.setenv(INITIAL_PEERS_ENV, server.url)
    joined = []
    try:
        joined.append(start_dht(resolve_initial_peers([server.url])))
        joined.append(start_dht(resolve_initial_peers(None)))
        assert count_known_peers(joined[1]) == before["dht_peers"] + 2
        wait_until(
            lambda: server.get("/health").json()["dht_peers"] == before["dht_peers"] + 2, 15, "health counts both"
        )
    finally:
        for dht in joined:
            dht.shutdown()
    health = server.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    assert health.json()["peer_id"] == server.peer_id
    assert health.json()["uptime_s"] > before["uptime_s"] >= 0


def test_20_simultaneous_requests_are_answered(server):
    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(server.get, ["/return_dht_address", "/health"] * 10))
    assert [response.status_code for response in responses] == [200] * 20
    assert all(response.json() == {"initial_peers": server.initial_peers} for response in responses[::2])


def test_nothing_else_is_served(server):
    assert [server.get(path).status_code for path in ("/", "/docs", "/openapi.json")] == [404] * 3
    assert requests.post(server.url + "/health", timeout=10).status_code == 405


def test_a_taken_port_is_one_clear_line_and_status_2(server, tmp_path):
    port = server.url.rpartition(":")[2]
    second = Server(tmp_path, "--port", port)
    _, complaint = second.process.communicate(timeout=START_TIMEOUT_S)
    assert second.process.returncode == 2
    assert complaint == f"hivetrain: error: cannot listen on 127.0.0.1 port {port}: Address already in use\n"
    assert not (tmp_path / "bootstrap.id").exists()


def test_kill_9_leaves_nothing_and_a_restart_keeps_peer_id_and_address(tmp_path):
    host_maddr = f"/ip4/127.0.0.1/tcp/{free_port()}"
    with bootstrap(tmp_path, "--host-maddrs", host_maddr) as first:
        assert "p2pd" in {child.name() for child in first.children}
        assert first.end(first.process.kill, within_s=5) == -signal.SIGKILL
    assert first.address_file.exists(), "the second one has to remove it before it writes its own"
    with bootstrap(tmp_path, "--host-maddrs", host_maddr) as second:
        assert second.initial_peers == first.initial_peers == [f"{host_maddr}/p2p/{first.peer_id}"]
        with requests.Session() as kept_alive:
            assert kept_alive.get(second.url + "/health", timeout=10).ok
            assert second.end(second.process.terminate) == 0
        assert not second.address_file.exists()


def test_ctrl_c_in_a_terminal_ends_it_with_130(tmp_path):
    maddrs = ["/dns4/example.org/tcp/4444", "/ip4/192.0.2.7/tcp/4444"]
    with bootstrap(tmp_path, "--announce-maddrs", ",".join(maddrs)) as running:
        announced = [f"{maddr}/p2p/{running.peer_id}" for maddr in maddrs]
        assert sorted(running.get("/return_dht_address").json()["initial_peers"]) == announced
        assert running.end(lambda: os.killpg(running.process.pid, signal.SIGINT)) == 130
        assert "Traceback" not in running.process.stderr.read()


def test_sigterm_while_it_tries_to_join_leaves_nothing(tmp_path):
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWERA6naQ3663hGS7FwyZyaNQkecVMeidTvQnG3ww1QGF1"
    starting = Server(tmp_path, "--initial-peers", nobody)
    assert any("trying again" in line for line in starting.process.stderr)
    starting.children = psutil.Process(starting.process.pid).children(recursive=True)
    assert starting.end(starting.process.terminate) == 0
    starting.process.stderr.close()


@pytest.mark.parametrize("victim", ["DHT process", "p2pd"])
def test_health_is_503_when_the_dht_has_died(tmp_path, victim):
    with bootstrap(tmp_path) as running:
        (p2pd,) = [child for child in running.children if child.name() == "p2pd"]
        (p2pd if victim == "p2pd" else p2pd.parent()).kill()
        wait_until(lambda: running.get("/health").status_code == 503, 5, "health notices")
        assert running.get("/health").json()["status"] == "unavailable"
        assert "died" in running.get("/health").json()["reason"]
        assert running.get("/return_dht_address").status_code == 503
        assert running.end(running.process.terminate) == 0
