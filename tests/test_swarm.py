import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time

import psutil
import pytest
from hivemind.utils.mpfuture import MPFuture, SharedBytes

from hivetrain.errors import UserError
from hivetrain.swarm import (
    DHTUnavailableError,
    SwarmDHT,
    SwarmJoinError,
    count_known_peers,
    resolve_initial_peers,
    start_dht,
    visible_maddrs,
)
from hivetrain.swarm.locks import free_abandoned_locks
from hivetrain.swarm.processes import is_running, list_descendants

PEER_ID = "12D3KooWERA6naQ3663hGS7FwyZyaNQkecVMeidTvQnG3ww1QGF1"
PEER_A = f"/ip4/192.0.2.1/tcp/1111/p2p/{PEER_ID}"
PEER_B = f"/dns4/peer.example.org/tcp/2222/p2p/{PEER_ID}"
NOBODY = f"/ip4/127.0.0.1/tcp/9/p2p/{PEER_ID}"


def wait_until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def dhts():
    started = []
    yield started
    for dht in started:
        dht.shutdown()


# The DHT


def test_peers_join_through_a_living_address_and_the_dead_one_is_named(dhts, caplog):
    dhts.append(start_dht([]))
    (address,) = visible_maddrs(dhts[0])
    assert count_known_peers(dhts[0]) == 0
    dhts.append(start_dht(resolve_initial_peers(f"{NOBODY},{address}")))
    assert f"not through {NOBODY}: it did not answer" in caplog.text
    assert count_known_peers(dhts[0]) == count_known_peers(dhts[1]) == 1
    dhts.append(start_dht([address], client_mode=True))
    assert dhts[2].client_mode
    assert dhts[1].store("key", "value", time.time() + 60, subkey=b"mine")
    assert dhts[2].get("key", latest=True).value[b"mine"].value == "value"


def test_peers_that_seed_alike_know_each_other(dhts):
    random.seed(7)
    dhts.append(start_dht([]))
    random.seed(7)
    dhts.append(start_dht(visible_maddrs(dhts[0])))
    assert count_known_peers(dhts[0]) == count_known_peers(dhts[1]) == 1


def test_a_swarm_that_cannot_be_joined_is_an_error_that_names_the_address():
    started_at = time.monotonic()
    with pytest.raises(SwarmJoinError, match=f"cannot join the swarm through {NOBODY}: .*failed to connect"):
        start_dht([NOBODY], startup_timeout_s=2)
    assert time.monotonic() - started_at < 6
    assert not p2pds_of(os.getpid())


def test_an_identity_file_keeps_peer_id_and_address(tmp_path, dhts):
    identity = tmp_path / "keys" / "peer.id"
    host_maddrs = [f"/ip4/127.0.0.1/tcp/{free_port()}"]
    dhts.append(start_dht([], identity_path=identity, host_maddrs=host_maddrs))
    before = visible_maddrs(dhts[0])
    assert stat.S_IMODE(identity.stat().st_mode) == 0o400
    assert os.listdir(identity.parent) == ["peer.id"]
    with pytest.raises(UserError, match="cannot listen on .*: Address already in use"):
        start_dht([], host_maddrs=host_maddrs)
    dhts[0].shutdown()
    dhts.append(start_dht([], identity_path=identity, host_maddrs=host_maddrs))
    assert visible_maddrs(dhts[1]) == before
    assert before == [f"{host_maddrs[0]}/p2p/{dhts[1].peer_id}"]


@pytest.mark.parametrize("content", [b"", b"not a key", b"\x08\x00\x12\x04abcd"])
def test_a_corrupt_identity_is_an_error_and_left_alone(tmp_path, content):
    identity = tmp_path / "peer.id"
    identity.write_bytes(content)
    with pytest.raises(UserError, match=r"peer\.id holds no usable private key"):
        start_dht([], identity_path=identity)
    assert identity.read_bytes() == content


def test_an_announced_address_replaces_the_local_one(dhts):
    dhts.append(start_dht([], announce_maddrs=["/ip4/192.0.2.7/tcp/4444"]))
    assert visible_maddrs(dhts[0]) == [f"/ip4/192.0.2.7/tcp/4444/p2p/{dhts[0].peer_id}"]


# Its processes


def p2pds_of(pid):
    return [process for process in list_descendants(pid) if process.name() == "p2pd"]


def test_shutdown_removes_the_p2pd_of_a_killed_dht_process(dhts):
    dhts.append(start_dht([]))
    (p2pd,) = p2pds_of(dhts[0].pid)
    os.kill(dhts[0].pid, signal.SIGKILL)
    wait_until(lambda: not dhts[0].is_serving, 5, "death noticed")
    with pytest.raises(DHTUnavailableError, match="not running"):
        visible_maddrs(dhts[0])
    dhts[0].shutdown()
    assert not is_running(p2pd)
    dhts[0].shutdown()


def test_a_hung_dht_process_neither_blocks_a_call_nor_the_shutdown(dhts):
    dhts.append(start_dht([]))
    processes = [psutil.Process(dhts[0].pid), *p2pds_of(dhts[0].pid)]
    os.kill(dhts[0].pid, signal.SIGSTOP)
    with pytest.raises(DHTUnavailableError, match=r"no answer within 0\.5 s"):
        visible_maddrs(dhts[0], timeout_s=0.5)
    started_at = time.monotonic()
    dhts[0].shutdown()
    assert time.monotonic() - started_at < 10
    assert not any(map(is_running, processes))


@pytest.mark.parametrize("p2pd_runs", [False, True])
def test_a_shutdown_in_the_middle_of_the_start_leaves_nothing(p2pd_runs):
    dht = SwarmDHT([NOBODY] if not p2pd_runs else None, start=False)
    dht.start()
    processes = [psutil.Process(dht.pid)]
    if p2pd_runs:
        wait_until(lambda: p2pds_of(dht.pid), 10, "p2pd runs")
        processes += p2pds_of(dht.pid)
    dht.shutdown()
    assert not any(map(is_running, processes))


@pytest.mark.parametrize("lock", [MPFuture._update_lock, MPFuture._initialization_lock, SharedBytes._lock])
def test_a_process_killed_with_a_shared_lock_in_hand_does_not_stop_the_next_dht(dhts, lock, monkeypatch, caplog):
    monkeypatch.setattr("hivetrain.swarm.locks.MAX_HELD_S", 0.2)
    free_abandoned_locks()  # an earlier test may have killed one with it, too
    caplog.clear()
    child = os.fork()
    if child == 0:
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    dhts.append(start_dht([], startup_timeout_s=20))
    assert visible_maddrs(dhts[0])
    assert caplog.text.count("seems to have held it") == 1


TWO_PEERS = """
import sys, threading
from hivetrain.swarm import start_dht, visible_maddrs
first = start_dht([])
print("first", flush=True)
second = start_dht(visible_maddrs(first))
print("second", flush=True)
threading.Event().wait(60)
"""


def test_kill_9_of_the_main_process_leaves_nothing_within_5_s():
    main = subprocess.Popen([sys.executable, "-c", TWO_PEERS], stdout=subprocess.PIPE, text=True)
    assert main.stdout is not None
    assert main.stdout.readline() == "first\n"  # one peer is in the swarm, the other is starting
    wait_until(lambda: len(list_descendants(main.pid)) >= 3, 10, "the second one was forked")
    children = psutil.Process(main.pid).children(recursive=True)
    assert any(child.name() == "p2pd" for child in children)
    main.kill()
    main.wait()
    main.stdout.close()
    wait_until(lambda: not any(map(is_running, children)), 5, "all gone")


def run_python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_program_that_forgets_to_shut_down_leaves_nothing():
    script = TWO_PEERS.replace(
        "threading.Event().wait(60)",
        "import psutil; print(*(child.pid for child in psutil.Process().children(recursive=True)))",
    )
    pids = [int(pid) for pid in run_python(script).splitlines()[-1].split()]
    assert len(pids) >= 4
    wait_until(lambda: not any(psutil.pid_exists(pid) and is_running(psutil.Process(pid)) for pid in pids), 5, "gone")


def test_importing_starts_nothing():
    script = "import hivetrain.swarm, psutil, threading as t; print(psutil.Process().children(), t.active_count())"
    assert run_python(script) == "[] 1\n"
