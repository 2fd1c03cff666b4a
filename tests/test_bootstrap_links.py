"""Several bootstraps: they find each other, mend a split, and one of them is enough."""

import signal
import socket
import time
from contextlib import ExitStack

import pytest
from bootstrap_server import bootstrap, wait_until

from hivetrain.bootstrap_links import LinkState, check_others, marker_of
from hivetrain.errors import UserError
from hivetrain.swarm import resolve_initial_peers, start_dht


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def states(server):
    return [link["state"] for link in server.get("/health").json()["bootstraps"]]


def last_seen(server):
    return server.get("/health").json()["last_seen"]


def start_three(stack, tmp_path):
    """Three bootstraps that are each given the URLs of all three, started one after the other."""
    ports = [free_port() for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    servers = []
    for number, port in enumerate(ports):
        folder = tmp_path / str(number)
        folder.mkdir()
        servers.append(stack.enter_context(bootstrap(folder, "--port", str(port), "--initial-peers", *urls)))
    return servers, urls


def test_three_bootstraps_know_each_other_and_one_is_enough_for_a_newcomer(tmp_path):
    with ExitStack() as stack:
        servers, urls = start_three(stack, tmp_path)
        for server in servers:
            wait_until(lambda server=server: states(server) == ["linked"] * 2, 40, "it knows the two others")
            assert server.get("/health").json()["status"] == "ok"
        miner = start_dht(resolve_initial_peers(urls[0]))
        stack.callback(miner.shutdown)
        assert miner.store("key", "value", time.time() + 600, subkey=b"mine")
        for server in servers[1:]:
            assert server.end(server.process.kill, within_s=5) == -signal.SIGKILL
        started_at = time.monotonic()
        newcomer = start_dht(resolve_initial_peers(urls[::-1]))
        stack.callback(newcomer.shutdown)
        assert time.monotonic() - started_at < 60
        assert newcomer.get("key", latest=True).value[b"mine"].value == "value"
        wait_until(lambda: states(servers[0]) == ["silent"] * 2, 40, "the survivor misses them")
        both = {str(miner.peer_id), str(newcomer.peer_id)}
        wait_until(lambda: both <= {peer["peer_id"] for peer in last_seen(servers[0])}, 20, "it has seen both")
        seen = last_seen(servers[0])
        assert all(peer["first_seen"] <= peer["last_seen"] <= time.time() + 1 for peer in seen)


def test_a_split_is_seen_said_and_mended(tmp_path):
    """The second one answers over HTTP, but names an address where nobody is; then it comes back with the right one."""
    with ExitStack() as stack:
        for name in "ab":
            (tmp_path / name).mkdir()
        port = str(free_port())
        nowhere = ("--announce-maddrs", f"/ip4/127.0.0.1/tcp/{free_port()}")
        with bootstrap(tmp_path / "b", "--port", port, *nowhere) as apart:
            first = stack.enter_context(bootstrap(tmp_path / "a", "--initial-peers", apart.url))
            wait_until(lambda: states(first) == ["split"], 40, "the first sees that the other is apart")
            health = first.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "split")
            apart.end(apart.process.kill)
        second = stack.enter_context(bootstrap(tmp_path / "b", "--port", port))
        miner = start_dht(resolve_initial_peers(second.url))
        stack.callback(miner.shutdown)
        assert miner.store("key", "value", time.time() + 600, subkey=b"mine")
        wait_until(lambda: states(first) == ["linked"], 40, "mended")
        assert first.get("/health").json()["status"] == "ok"
        reader = start_dht(resolve_initial_peers(first.url))
        stack.callback(reader.shutdown)
        assert reader.get("key", latest=True).value[b"mine"].value == "value"
        first.end(first.process.terminate)
        said = first.process.stderr.read()
        assert "the DHT is split" in said
        assert "joined the DHT of bootstrap" in said


def test_a_relay_says_so_and_serves(tmp_path):
    with bootstrap(tmp_path, "--relay") as relay:
        assert relay.get("/health").json()["relay"] is True
        miner = start_dht(resolve_initial_peers(relay.url))
        miner.shutdown()
        (p2pd,) = [child for child in relay.children if child.name() == "p2pd"]
        assert any("forceReachabilityPublic" in argument for argument in p2pd.cmdline())


def test_names_of_others_are_checked():
    assert check_others(["http://a, http://b", "http://a"]) == ["http://a", "http://b"]
    with pytest.raises(UserError, match="too many"):
        check_others([f"http://{n}" for n in range(17)])
    with pytest.raises(UserError, match="peer id is missing"):
        check_others(["/ip4/192.0.2.1/tcp/1"])
    assert marker_of(b"one") != marker_of(b"two")
    assert LinkState("split") is LinkState.SPLIT
