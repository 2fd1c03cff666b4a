import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from bootstrap_server import START_TIMEOUT_S, Server, bootstrap, wait_until

from hivetrain.swarm import INITIAL_PEERS_ENV, count_known_peers, resolve_initial_peers, start_dht


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


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


def test_50_miners_that_ask_at_once_are_answered_in_5_s(server):
    started_at = time.monotonic()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: server.get("/return_dht_address"), range(50)))
    assert time.monotonic() - started_at < 5
    assert [answer.json() for answer in answers] == [{"initial_peers": server.initial_peers}] * 50


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
    assert complaint.startswith(f"hivetrain: error: cannot listen on 127.0.0.1 port {port}: Address already in use")
    assert complaint.count("\n") == 1
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


def test_sigterm_while_it_looks_for_another_leaves_nothing(tmp_path):
    nobody = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWERA6naQ3663hGS7FwyZyaNQkecVMeidTvQnG3ww1QGF1"
    with bootstrap(tmp_path, "--initial-peers", nobody) as running:
        wait_until(lambda: links_of(running) == ["silent"], 20, "it has looked")
        assert running.end(running.process.terminate) == 0


def links_of(server):
    return [link["state"] for link in server.get("/health").json()["bootstraps"]]


def test_a_malformed_peer_is_one_clear_line_and_status_2(tmp_path):
    refused = Server(tmp_path, "--initial-peers", "/ip4/127.0.0.1/tcp/9")
    _, complaint = refused.process.communicate(timeout=START_TIMEOUT_S)
    assert refused.process.returncode == 2
    assert complaint.startswith("hivetrain: error: initial peer '/ip4/127.0.0.1/tcp/9': the peer id is missing")
    assert complaint.count("\n") == 1


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
