"""Joins the swarm's DHT with a deadline, and ends its processes with certainty.

The surprising fact: hivemind forks its DHT and that fork starts ``p2pd``; neither notices when the training process is
killed, so ``SwarmDHT`` makes both watch it.
"""

import concurrent.futures
import logging
import os
import random
import select
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import hivemind
import psutil
from hivemind.dht import DHTNode
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p.p2p_daemon import P2PD_FILENAME
from hivemind.utils.multiaddr import Multiaddr

from hivetrain.errors import UserError
from hivetrain.swarm.addresses import SwarmJoinError
from hivetrain.swarm.identity import ensure_identity
from hivetrain.swarm.listening import is_loopback, parse_option, refuse_taken_ports
from hivetrain.swarm.locks import free_abandoned_locks
from hivetrain.swarm.processes import end_with_parent, is_running, kill_all, list_descendants
from hivetrain.swarm.records import HotkeyRecords

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEFAULT_HOST_MADDRS = ("/ip4/127.0.0.1/tcp/0",)
LIVENESS_POLL_S = 0.2
GRACE_S = 2.0
MAX_RETRY_PAUSE_S = 5.0


class DHTUnavailableError(RuntimeError):
    """The DHT process is dead or does not answer."""


class SwarmDHT(hivemind.DHT):
    """hivemind's DHT whose forked process and p2pd end with the process that started them, however that ends.

    Takes hivemind's arguments. ``shutdown`` is bounded (some 10 s at the very worst) and may be called at any moment,
    also while the DHT is starting, and more than once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._daemons: list[psutil.Process] = []
        self._shutdown_lock = threading.Lock()
        super().__init__(*args, **kwargs)

    def run(self) -> None:
        """The forked process."""
        end_with_parent(self._parent_pid)
        os.setpgrp()  # a Ctrl-C would end p2pd under the feet of a program that wants to take leave of the swarm
        try:
            super().run()
        finally:
            kill_all(list_descendants(os.getpid()))

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait for the DHT to answer; unlike hivemind's, notices when its process dies.

        Raises:
            TimeoutError: it took longer than ``timeout`` seconds.
            DHTUnavailableError: the DHT process ended before it was ready.
        """
        _wait_while_alive(self, self._ready, timeout)
        self._daemons = [process for process in list_descendants(self.pid) if process.name() == P2PD_FILENAME]

    @property
    def is_serving(self) -> bool:
        """Whether the DHT process and its p2pd are running."""
        return self.is_alive() and bool(self._daemons) and all(map(is_running, self._daemons))

    def shutdown(self) -> None:
        """End the DHT process and p2pd: politely, then by force."""
        if os.getpid() != self._parent_pid or self._popen is None:
            return
        with self._shutdown_lock:
            lost = any(not is_running(daemon) for daemon in self._daemons)
            daemons = self._daemons + (list_descendants(self.pid) if self.is_alive() else [])
            self._ask_to_shut_down()
            self.join(0 if lost else self.shutdown_timeout)  # without its p2pd, hivemind would wait in vain
            for force in (self.terminate, self.kill):
                if self.is_alive():
                    logger.warning("ending the DHT process by force: %s", "p2pd is gone" if lost else "it does not end")
                    force()
                    self.join(GRACE_S)
            kill_all(daemons)

    def _ask_to_shut_down(self) -> None:
        with suppress(OSError, ValueError):  # closed by an earlier call, or nobody is left to read
            if select.select([], [self._outer_pipe], [], 0)[1]:
                self._outer_pipe.send(("_shutdown", [], {}))
            self._outer_pipe.close()


def start_dht(
    initial_peers: Sequence[str],
    *,
    host_maddrs: Sequence[str] = DEFAULT_HOST_MADDRS,
    announce_maddrs: Sequence[str] | None = None,
    identity_path: str | os.PathLike[str] | None = None,
    client_mode: bool = False,
    use_relay: bool = True,
    use_auto_relay: bool = False,
    use_ipfs: bool = False,
    force_reachability: str | None = None,
    startup_timeout_s: float = 60.0,
    record_validators: Sequence[RecordValidatorBase] = (),
) -> SwarmDHT:
    """Join the DHT, or start a new one, and wait until it answers. The caller shuts it down.

    Args:
        initial_peers: multiaddrs to join through (see ``resolve_initial_peers``); empty starts a new swarm. While none
            of them can be reached, joining is tried again until the time is up.
        host_maddrs: where to listen. The default is for swarms on one machine; across machines pass for example
            ``/ip4/0.0.0.0/tcp/31337`` (port 0 picks a free one).
        announce_maddrs: external addresses to announce instead of those listened on, behind a port forwarding.
        identity_path: key file that makes the peer id permanent; created when missing.
        client_mode: use the DHT without serving it.
        use_relay: reach peers behind NAT through relays.
        use_auto_relay: look for a relay that makes this peer reachable behind NAT.
        use_ipfs: find peers through the public IPFS network; excludes ``initial_peers``.
        force_reachability: ``public`` or ``private``, for somebody who knows better than libp2p; a relay is ``public``.
        startup_timeout_s: limit for joining; ending a failed attempt may add a few seconds.
        record_validators: hivemind validators for the records of the DHT. Signatures of protected records are always
            checked, also by peers that sign none.

    Raises:
        SwarmJoinError: no peer could be reached, or the DHT could not start; says where and why.
        UserError: an argument or the identity file is unusable.
    """
    if use_ipfs and initial_peers:
        raise UserError("use_ipfs excludes initial_peers: remove one of them")
    deadline = time.monotonic() + startup_timeout_s
    peers = [parse_option("initial_peers", peer, with_peer_id=True) for peer in initial_peers]
    hosts = [parse_option("host_maddrs", maddr) for maddr in host_maddrs]
    announced = [parse_option("announce_maddrs", maddr) for maddr in announce_maddrs or ()]
    is_known_identity = identity_path is not None and os.path.exists(identity_path)
    if identity_path is not None:
        ensure_identity(identity_path)
    refuse_taken_ports(hosts)
    local_only = all(map(is_loopback, hosts))
    if local_only and not announced and not client_mode and not all(map(is_loopback, peers)):
        logger.warning("no other machine can connect to %s: pass host_maddrs such as /ip4/0.0.0.0/tcp/31337", hosts)
    options = {
        # hivemind keeps the first of each kind: a signing one of the caller takes the place of these
        "record_validators": (*record_validators, HotkeyRecords(), RSASignatureValidator()),
        "client_mode": client_mode,
        "host_maddrs": hosts,
        "announce_maddrs": announced or None,
        "identity_path": None if identity_path is None else os.fspath(identity_path),
        "check_if_identity_free": is_known_identity,  # asks through another p2pd; nobody can have a new key
        "use_relay": use_relay,
        "use_auto_relay": use_auto_relay,
        "use_ipfs": use_ipfs,
        "force_reachability": force_reachability,
        "nat_port_map": not local_only,  # nothing to ask a router for
    }
    dht = _join(peers, hosts, deadline, options)
    _report_unreached(dht, peers)
    return dht


def run_in_dht(dht: SwarmDHT, coroutine: Callable[[hivemind.DHT, DHTNode], Awaitable[T]], *, timeout_s: float) -> T:
    """Run a picklable coroutine function inside the DHT process, with a deadline.

    Raises:
        DHTUnavailableError: the DHT process is dead or gave no answer in time.
    """
    if not dht.is_alive():
        raise DHTUnavailableError("the DHT process is not running")
    if not select.select([], [dht._outer_pipe], [], timeout_s)[1]:
        raise DHTUnavailableError(f"the DHT process has taken no request for {timeout_s:g} s")
    future = dht.run_coroutine(coroutine, return_future=True)
    try:
        return _wait_while_alive(dht, future, timeout_s)
    except TimeoutError as error:
        raise DHTUnavailableError(f"the DHT process gave no answer within {timeout_s:g} s") from error
    except ConnectionError as error:
        raise DHTUnavailableError(f"the DHT process has lost its p2pd: {error}") from error


def visible_maddrs(dht: SwarmDHT, *, timeout_s: float = 10.0) -> list[str]:
    """This peer's multiaddrs, each ending in its peer id, as other peers should use them.

    Raises:
        DHTUnavailableError: the DHT process is dead or gave no answer in time.
    """
    return [str(maddr) for maddr in run_in_dht(dht, _get_visible_maddrs, timeout_s=timeout_s)]


def count_known_peers(dht: SwarmDHT, *, timeout_s: float = 10.0) -> int:
    """Number of other peers in the DHT's routing table.

    Raises:
        DHTUnavailableError: the DHT process is dead or gave no answer in time.
    """
    return run_in_dht(dht, _count_known_peers, timeout_s=timeout_s)


def _join(peers: list[str], hosts: list[str], deadline: float, options: dict[str, Any]) -> SwarmDHT:
    pause_s = 0.5
    told = ""
    while True:
        try:
            return _start_once(peers, deadline, options)
        except Exception as error:  # hivemind raises bare RuntimeErrors, p2pd's own and asyncio's among others
            reason = str(error) or type(error).__name__
            if told and isinstance(error, TimeoutError):  # time was up: what failed before says more
                reason = f"{told}; then {reason}"
            told = reason
            wait_s = pause_s * random.uniform(0.5, 1.0)
            if not peers:
                raise SwarmJoinError(f"cannot start a DHT peer on {', '.join(hosts)}: {reason}") from error
            if time.monotonic() + wait_s >= deadline:
                raise SwarmJoinError(f"cannot join the swarm through {', '.join(peers)}: {reason}") from error
            logger.warning("cannot join the swarm through %s: %s; trying again", ", ".join(peers), reason)
            time.sleep(wait_s)
            pause_s = min(MAX_RETRY_PAUSE_S, pause_s * 2)


def _start_once(peers: list[str], deadline: float, options: dict[str, Any]) -> SwarmDHT:
    free_abandoned_locks()
    left_s = max(0.1, deadline - time.monotonic())
    dht = SwarmDHT(peers, start=False, startup_timeout=left_s, **options)
    try:
        dht.run_in_background(timeout=left_s)
    except TimeoutError as error:
        dht.shutdown()
        raise TimeoutError(f"not ready within {left_s:.1f} s") from error
    except BaseException:
        dht.shutdown()
        raise
    return dht


def _wait_while_alive(dht: SwarmDHT, future: "concurrent.futures.Future[T]", timeout_s: float | None) -> T:
    deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
    while not future.done():
        was_alive = dht.is_alive()
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        concurrent.futures.wait([future], timeout=min(left_s, LIVENESS_POLL_S if was_alive else GRACE_S))
        if not was_alive and not future.done():
            raise DHTUnavailableError(f"the DHT process ended unexpectedly (exit code {dht.exitcode})")
    return future.result()


def _report_unreached(dht: SwarmDHT, peers: list[str]) -> None:
    try:
        reached = run_in_dht(dht, _list_connected, timeout_s=10)
    except DHTUnavailableError:
        dht.shutdown()
        raise
    for peer in peers:
        if reached.isdisjoint(peer.split("/")):
            logger.warning("joined the swarm, but not through %s: it did not answer", peer)


async def _get_visible_maddrs(_dht: hivemind.DHT, node: DHTNode) -> list[Multiaddr]:
    return await node.get_visible_maddrs(latest=True)


async def _count_known_peers(_dht: hivemind.DHT, node: DHTNode) -> int:
    return len(node.protocol.routing_table.peer_id_to_uid)


async def _list_connected(_dht: hivemind.DHT, node: DHTNode) -> set[str]:
    return {peer.peer_id.to_base58() for peer in await node.p2p.list_peers()}
