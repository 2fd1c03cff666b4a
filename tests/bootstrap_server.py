"""A bootstrap server as a program, for tests."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import requests

from hivetrain.swarm.processes import is_running

START_TIMEOUT_S = 60


def wait_until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


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
