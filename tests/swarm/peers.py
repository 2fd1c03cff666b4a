"""Peers as real processes on loopback, to be watched, stopped and killed."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import worker

from hivetrain.swarm.processes import is_running, list_descendants

# Imports once what takes long, not once for each peer. By names that are on every path: the server does not get the
# tests' own one, and ignores what it cannot import. Not hivemind: its locks would be one for all peers, dead or alive.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["pytest", "torch._dynamo", "lightning.pytorch"])

TRANSPORTS = ("direct", "libp2p")  # the first fails a round rather than use the second


def over_both(names, cases, quick=None):
    """Parametrises a test with ``cases``, each over both transports; over libp2p all but the ``quick`` ones are slow.

    Args:
        names: of the parameters, besides ``transport``.
        cases: tuples of their values.
        quick: those that run over both by default; None: all.
    """
    params = []
    for case, transport in itertools.product(cases, TRANSPORTS):
        is_slow = transport == "libp2p" and quick is not None and case not in quick
        params.append(pytest.param(*case, transport, marks=[pytest.mark.slow] * is_slow))
    return pytest.mark.parametrize((*names, "transport"), params)


def wait_until(condition, timeout_s, what, peers=()):
    """Polls ``condition`` and returns its first true value; shows the peers' logs when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            logs = "\n".join(f"--- {peer.name}\n{peer.log[-3000:]}" for peer in peers)
            pytest.fail(f"not within {timeout_s} s: {what}\n{logs}")
        time.sleep(0.02)
    return value


def _run(options, log):
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    worker.main(options)


class Peer:
    """One peer: its process and the files that it writes."""

    def __init__(self, name, directory, options, fresh):
        self.name, self._files = (
            name,
            {kind: directory / f"{name}.{kind}" for kind in ("out", "status", "stage", "log")},
        )
        self._transport = options["transport"]
        options = options | {kind: str(self._files[kind]) for kind in ("out", "status", "stage")}
        if fresh:
            with self._files["log"].open("w") as log:
                command = [sys.executable, worker.__file__, json.dumps(options)]
                self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        else:
            self._process = FORKSERVER.Process(target=_run, args=(options, str(self._files["log"])))
            self._process.start()
        self.main = psutil.Process(self._process.pid)
        self._seen = {}

    def _read(self, kind):
        with suppress(FileNotFoundError):
            return self._files[kind].read_text()
        return ""

    @property
    def log(self):
        return self._read("log")

    @property
    def stage(self):
        return self._read("stage")

    @property
    def epoch(self):
        """The last epoch that the peer has told; -1 before it trains."""
        return self._status["epoch"]

    @property
    def group_size(self):
        """How many peers made the last update that the peer has told; 0 before the first."""
        return self._status["group_size"]

    @property
    def _status(self):
        return json.loads(self._read("status") or '{"epoch": -1, "group_size": 0}')

    @property
    def is_alive(self):
        return is_running(self.main)

    def processes(self):
        """All that live of this peer, also what outlived its main process."""
        if self.is_alive:
            self._seen |= {process.pid: process for process in [self.main, *list_descendants(self.main.pid)]}
        return [process for process in self._seen.values() if is_running(process)]

    def send(self, signum, everything=False):
        """Signals the main process, or all of the peer's processes."""
        processes = self.processes()
        for process in processes if everything else [self.main]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def kill(self, everything=True):
        self.send(signal.SIGKILL, everything)

    def wait(self, timeout_s=120):
        """Waits for the end and returns the result."""
        wait_until(lambda: not self.is_alive, timeout_s, f"end of {self.name}", [self])
        result = json.loads(self._read("out"))
        assert_ways(result["rounds"], self._transport)
        return result


class Swarm:
    """Starts peers of one run."""

    def __init__(self, directory, run_id, initial_peers, transport):
        self.directory, self.peers = directory, []
        self._finish, self._release = directory / "finish", directory / "release"
        self.common = {
            "run_id": run_id,
            "initial_peers": initial_peers,
            "transport": transport,
            "epochs": 10**6,
            "finish": str(self._finish),
            "release": str(self._release),
        }

    def start(self, name, fresh=False, **options):
        number = len(self.peers)
        options = {"data_seed": number, **self.common, **options}
        peer = Peer(f"{name}{number}", self.directory, options, fresh)
        self.peers.append(peer)
        return peer

    def start_together(self, number, **options):
        """Starts peers that do not train before they see each other."""
        return [self.start("peer", peers=number, **options) for _ in range(number)]

    def wait_for(self, condition, timeout_s=60, what="condition"):
        return wait_until(condition, timeout_s, what, self.peers)

    def wait_for_epoch(self, epoch, *peers, timeout_s=90):
        self.wait_for(lambda: all(p.epoch >= epoch for p in peers or self.peers), timeout_s, f"epoch {epoch}")

    def finish(self, *peers, epochs=2):
        """Lets peers make some more epochs, all to the same one, and returns their results."""
        last = max(peer.epoch for peer in peers) + epochs
        worker.write(self._finish, str(last))
        self.wait_for_epoch(last, *peers)
        self._release.touch()
        results = [peer.wait() for peer in peers]
        assert any(report["outcome"] == "averaged" for result in results for report in result["rounds"])
        return results

    def close(self):
        for peer in self.peers:
            peer.send(signal.SIGCONT, everything=True)
            peer.kill()
        for peer in self.peers:
            peer._process.wait() if isinstance(peer._process, subprocess.Popen) else peer._process.join()


def committed(result):
    """The reports of a result that led to a global update."""
    return [report for report in result["rounds"] if report["outcome"] in ("averaged", "alone", "local")]


def assert_truthful(result):
    """What a peer's reports say adds up."""
    assert result["samples"] + result["dropped"] + result["accumulated"] == result["trained"], result
    for report in result["rounds"]:
        if report["outcome"] == "averaged":
            assert report["fraction"] == 1.0, report
            assert report["group_size"] >= 2, report
            assert report["group_size"] > report["expected_peers"] // 2, report
        if report["outcome"] not in ("averaged", "alone", "local"):
            assert report["samples"] == 0, report
            assert report["reason"], report


def assert_ways(rounds, transport):
    """All exchanges took the way that was asked for, to every other member; none fell back to another."""
    for report in rounds:
        ways = set(report["links"].values())
        if report["outcome"] == "averaged":
            assert len(report["links"]) == report["group_size"] - 1, report
            assert ways == {transport}, report
        else:
            assert ways <= {transport, "none"}, report


def assert_one_state(*results):
    """All end at one epoch with the same params and optimizer state."""
    assert len({(r["epoch"], r["digest"], r["optimizer"]) for r in results}) == 1, results
