"""Hosts of one machine: a network namespace each, joined by a switch, each with a limit on what it sends.

The switch has a namespace of its own too, so nothing of the machine's network is touched. A process moves into a host
for good, and only before it has threads: each thread of a process may be in another namespace.
"""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77  # exit status of whoever cannot measure here, as automake has it
INTERFACE = "line"
_CLONE_NEWNET = 0x40000000
_NETWORK = "10.77.0"
_SHAPE = "rate {}mbit burst 32kb latency 50ms"  # what waits longer is dropped, as by a router at home


class NotPermitted(Exception):
    """This machine does not let this program have network namespaces; the message says what is missing."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface, :data:`INTERFACE`.

    Attributes:
        name: of the namespace.
        address: IPv4.
    """

    name: str
    address: str

    @property
    def maddrs(self) -> tuple[str, ...]:
        """Where to listen in it, on any port."""
        return (f"/ip4/{self.address}/tcp/0",)

    def enter(self) -> None:
        """Moves this process, which has one thread, into the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")


@contextmanager
def hosts(number: int, mbit_s: float) -> Iterator[tuple[Host, list[Host]]]:
    """The switch, whose line has no limit, and ``number`` hosts that each send ``mbit_s`` at most.

    Raises:
        NotPermitted: this needs root, iproute2 and a kernel with network namespaces and tbf.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise NotPermitted(f"{' and '.join(missing)} not found: install iproute2")
    if os.geteuid():
        raise NotPermitted("only root may make network namespaces")
    _remove_leftovers()
    made: list[Host] = []
    try:
        switch = _add(made, f"hivetrain-{os.getpid()}-switch", f"{_NETWORK}.1")
        _ip(switch, f"link add {INTERFACE} type bridge")
        _start(switch)
        for index in range(number):
            host = _add(made, f"hivetrain-{os.getpid()}-{index}", f"{_NETWORK}.{index + 2}")
            _ip(switch, f"link add to{index} type veth peer name {INTERFACE} netns {host.name}")
            _ip(switch, f"link set to{index} master {INTERFACE} up")
            _ip(host, f"link set {INTERFACE} gso_max_segs 1")  # packets of 1,500 bytes, to be counted as such
            _run(f"tc -n {host.name} qdisc add dev {INTERFACE} root tbf {_SHAPE.format(mbit_s)}")
            _start(host)
        yield switch, made[1:]
    finally:
        for host in made:
            with suppress(NotPermitted, subprocess.TimeoutExpired):  # the others are to go all the same
                _run(f"ip netns del {host.name}")


def bytes_sent() -> int:
    """What this process's host has sent so far, with all headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counts.split()[8])
    raise OSError(f"no interface {INTERFACE} here")


def _add(made: list[Host], name: str, address: str) -> Host:
    host = Host(name, address)
    _run(f"ip netns add {name}")
    made.append(host)
    return host


def _start(host: Host) -> None:
    _ip(host, f"address add {host.address}/24 dev {INTERFACE}")
    _ip(host, f"link set {INTERFACE} up")
    _ip(host, "link set lo up")


def _remove_leftovers() -> None:
    """Removes the namespaces of programs that were killed."""
    for line in _run("ip netns list").splitlines():
        found = re.match(r"(hivetrain-(\d+)-\w+)", line)
        if found and not Path(f"/proc/{found[2]}").exists():
            with suppress(NotPermitted):  # somebody else was faster
                _run(f"ip netns del {found[1]}")


def _ip(host: Host, command: str) -> None:
    _run(f"ip -n {host.name} {command}")


def _run(command: str) -> str:
    ended = subprocess.run(command.split(), capture_output=True, text=True, timeout=10, check=False)
    if ended.returncode:
        raise NotPermitted(f"`{command}` failed: {ended.stderr.strip()}")
    return ended.stdout
