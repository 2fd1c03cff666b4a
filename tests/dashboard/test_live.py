"""The whole way: two real miners, the dashboard as a program, and a browser that sees one of them die."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
from scenes import opened, wait_until

import hivetrain.demo
from hivetrain.swarm import start_dht, visible_maddrs
from hivetrain.swarm.processes import is_running

MINER_CONFIG = Path(hivetrain.demo.__file__).with_name("miner.yaml")
RUN_ID = "live-dashboard"
EPOCHS = 10_000


class Program:
    """A ``hivetrain`` command in a process group of its own."""

    def __init__(self, folder, name, *arguments):
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hivetrain.cli", *map(str, arguments)],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, signum, within_s=10):
        """Sends a signal; the program and all that it started are gone within the time."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        began = time.monotonic()
        self.process.send_signal(signum)
        self.process.wait(within_s)
        wait_until(lambda: not any(map(is_running, children)), within_s, "no child is left")
        assert time.monotonic() - began < within_s
        assert children
        return self.process.returncode


@contextmanager
def running(programs):
    try:
        yield
    finally:
        for program in programs:
            program.kill()


@pytest.fixture(scope="module")
def bootstrap():
    dht = start_dht([])
    yield visible_maddrs(dht)[0]
    dht.shutdown()


def dashboard(folder, bootstrap, programs, *arguments):
    """Starts one; returns it and its URL."""
    file = folder / "address"
    program = Program(
        folder, f"dashboard{len(programs)}", "dashboard", "--run-id", RUN_ID, "--initial-peers", bootstrap,
        "--port", 0, "--address-file", file, "--interval", 1, *arguments,
    )  # fmt: skip
    programs.append(program)
    wait_until(lambda: file.exists() or program.process.poll() is not None, 60, "the dashboard listens")
    assert program.process.poll() is None, program.log.read_text()
    return program, file.read_text()


def miner(folder, bootstrap, slot):
    return Program(
        folder, f"miner{slot}", "fit", "--config", MINER_CONFIG, f"--trainer.strategy.run_id={RUN_ID}",
        f"--trainer.strategy.initial_peers={bootstrap}", f"--data.slot={slot}", f"--stop.epochs={EPOCHS}",
        "--status=hivetrain.callbacks.SwarmStatus", "--status.heldout_every=1", "--status.heldout_batches=1",
        "--data.init_args.batch_size=8", "--trainer.strategy.init_args.target_batch_size=64",
    )  # fmt: skip


def state(url):
    return requests.get(f"{url}/api/state", timeout=10).json()


@pytest.mark.browser
@pytest.mark.timeout(280)
def test_a_miner_that_is_killed_is_seen_as_lost_within_15_s(browser, tmp_path, bootstrap):
    programs = []
    with running(programs):
        program, url = dashboard(tmp_path, bootstrap, programs, "--db", tmp_path / "h.sqlite3")
        miners = [miner(tmp_path, bootstrap, slot) for slot in range(2)]
        programs += miners

        def trains_together():
            assert all(one.process.poll() is None for one in miners), miners[0].log.read_text()[-3000:]
            lines = state(url)["lists"]["epochs"]
            return [line for line in lines if line["outcome"] == "averaged" and line["reporters"] == 2]

        (line, *_) = wait_until(trains_together, 150, "both miners tell of a common update")
        assert (line["group_size"], line["fraction"]) == (2, 1.0)
        assert line["exchange_s"] > 0
        assert 0 < line["loss"] < 20
        wait_until(lambda: state(url)["lists"]["epochs"][-1]["heldout_loss"], 30, "a held-out loss is told")
        rows = state(url)["miners"]
        assert sorted(row["presence"] for row in rows) == ["live", "live"]
        assert {(row["device"], row["stranger"]) for row in rows} == {("cpu", False)}
        assert state(url)["parts"]["swarm"]["target"] == 64
        with opened(browser, url) as (page, complaints):
            page.wait_for_selector("#connection[data-state=live]")
            page.wait_for_function("() => document.querySelector('#card-peers .value').textContent === '2'")
            killed_at = time.monotonic()
            miners[0].kill()
            page.wait_for_selector("#miners-table tr.bad", timeout=15_000)
            seen_s = time.monotonic() - killed_at
            assert page.inner_text("#card-peers .value") == "1"
            assert page.inner_text("#events-table tbody tr:first-child td:nth-child(2)") == "lost"
            assert complaints == []
        print(f"\nseen as lost {seen_s:.1f} s after SIGKILL")
        assert seen_s < 15
        events = state(url)["lists"]["events"]
        assert program.end(signal.SIGTERM) == 0
        assert not (tmp_path / "address").exists()
        _, url = dashboard(tmp_path, bootstrap, programs, "--db", tmp_path / "h.sqlite3")
        assert state(url)["lists"]["events"][-len(events) :] == events
        assert line in state(url)["lists"]["epochs"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_within_10_s_with_a_stream_open_and_leaves_no_process(tmp_path, bootstrap, signum, status):
    programs = []
    with running(programs):
        program, url = dashboard(tmp_path, bootstrap, programs, "--db", ":memory:")
        version = wait_until(lambda: state(url)["version"], 20, "a first reading")
        since = f"{state(url)['feed']}-{version}"
        with requests.get(f"{url}/api/stream", params={"since": since}, stream=True, timeout=10) as stream:
            assert stream.status_code == 200
            assert program.end(signum) == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--initial-peers", ""], "pass --initial-peers"),
        (["--interval", "0"], "--interval must be"),
        (["--chain", "ftp://nowhere"], "is no chain"),
        (["--port", "{taken}"], "Address already in use; pass another --port"),
    ],
)
def test_a_mistake_gives_one_line(tmp_path, bootstrap, arguments, message):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        command = ["dashboard", "--run-id", RUN_ID, "--initial-peers", bootstrap, "--db", ":memory:"]
        command += [argument.replace("{taken}", taken) for argument in arguments]
        done = subprocess.run(
            [sys.executable, "-m", "hivetrain.cli", *command], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("hivetrain: error")]
    assert message in line
