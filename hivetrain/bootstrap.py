"""The bootstrap server: a long-lived DHT peer that tells newcomers over HTTP how to reach it.

It trains nothing, knows no chain and is trusted with nothing. The surprising fact: uvicorn raises the signal that
stopped it once more when it is done, so ``serve`` turns SIGTERM into an exception, and the DHT is shut down on every
way out.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from hivetrain.errors import UserError
from hivetrain.swarm import (
    DEFAULT_HOST_MADDRS,
    DHTUnavailableError,
    SwarmDHT,
    count_known_peers,
    resolve_initial_peers,
    start_dht,
    visible_maddrs,
)

logger = logging.getLogger(__name__)

DHT_TIMEOUT_S = 2.0
SNAPSHOT_AGE_S = 2.0
MAX_CONNECTIONS = 512
EXIT_AFTER_CTRL_C = 130


@dataclass(frozen=True)
class PeerSnapshot:
    """What the DHT peer said of itself; ``fault`` is None unless it is dead or did not answer."""

    maddrs: tuple[str, ...]
    known_peers: int
    fault: str | None


class PeerView:
    """Asks the DHT peer for its state at most once in ``SNAPSHOT_AGE_S``, however many requests want to know."""

    def __init__(self, dht: SwarmDHT, clock: Callable[[], float]) -> None:
        self._dht = dht
        self._clock = clock
        self._lock = threading.Lock()
        self._snapshot = PeerSnapshot((), 0, "not asked yet")
        self._taken_at = float("-inf")

    def read(self) -> PeerSnapshot:
        with self._lock:
            if not self._dht.is_serving:
                return PeerSnapshot((), 0, "the DHT process or its p2pd has died")
            if self._clock() - self._taken_at >= SNAPSHOT_AGE_S:
                self._snapshot = self._ask()
                self._taken_at = self._clock()
            return self._snapshot

    def _ask(self) -> PeerSnapshot:
        try:
            maddrs = visible_maddrs(self._dht, timeout_s=DHT_TIMEOUT_S)
            return PeerSnapshot(tuple(maddrs), count_known_peers(self._dht, timeout_s=DHT_TIMEOUT_S), None)
        except DHTUnavailableError as error:
            logger.warning("the DHT peer is unavailable: %s", error)
            return PeerSnapshot((), 0, str(error))


def create_app(dht: SwarmDHT, *, peer_id: str, clock: Callable[[], float] = time.monotonic) -> FastAPI:
    """The HTTP side of a running DHT peer.

    ``GET /return_dht_address`` answers ``{"initial_peers": [multiaddr, ...]}``; ``GET /health`` answers ``status``
    (``ok`` or ``unavailable``), ``peer_id``, ``uptime_s`` and ``dht_peers``, the number of other peers in the routing
    table. Both have status 503 and a ``reason`` when the DHT is dead or does not answer.
    """
    app = FastAPI(title="hivetrain bootstrap", docs_url=None, redoc_url=None, openapi_url=None)
    view = PeerView(dht, clock)
    started_at = clock()

    @app.get("/return_dht_address")
    def return_dht_address() -> JSONResponse:
        peer = view.read()
        if peer.fault:
            return JSONResponse({"status": "unavailable", "reason": peer.fault}, status_code=503)
        return JSONResponse({"initial_peers": peer.maddrs})

    @app.get("/health")
    def health() -> JSONResponse:
        peer = view.read()
        report = {"peer_id": peer_id, "uptime_s": round(clock() - started_at, 1), "dht_peers": peer.known_peers}
        if peer.fault:
            return JSONResponse({"status": "unavailable", "reason": peer.fault, **report}, status_code=503)
        return JSONResponse({"status": "ok", **report})

    return app


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    identity_path: str | os.PathLike[str] | None = None,
    host_maddrs: Sequence[str] = DEFAULT_HOST_MADDRS,
    announce_maddrs: Sequence[str] | None = None,
    initial_peers: Sequence[str] | str = (),
    address_file: str | os.PathLike[str] | None = None,
) -> int:
    """Run a bootstrap server until SIGTERM or Ctrl-C. Call it on the main thread.

    Args:
        host: where to listen for HTTP.
        port: port for HTTP; 0 picks a free one.
        identity_path: key file that makes the peer id permanent; created when missing.
        host_maddrs: where the DHT peer listens; a fixed port keeps its address over restarts.
        announce_maddrs: external addresses to announce, and to answer with, instead.
        initial_peers: peers or other bootstrap URLs of a swarm to join; empty starts a new swarm.
        address_file: JSON file with ``url``, ``peer_id`` and ``initial_peers``, complete from the moment it exists;
            written when the server listens, removed when it ends.

    Returns:
        The exit status: 0 after SIGTERM, 130 after Ctrl-C.

    Raises:
        UserError: the port is taken, the swarm cannot be joined, or an argument is unusable.
    """
    signal.signal(signal.SIGTERM, _raise_terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dht = None
    try:
        _listen(host, port).close()  # fails now rather than after joining; the DHT process must not inherit it
        if address_file is not None:
            Path(address_file).unlink(missing_ok=True)  # left by one that was killed
        dht = start_dht(
            resolve_initial_peers(initial_peers),
            host_maddrs=host_maddrs,
            announce_maddrs=announce_maddrs,
            identity_path=identity_path,
        )
        with _listen(host, port) as listener:
            _serve_http(dht, listener, address_file)
        return 0
    except _Terminated:
        return 0
    except KeyboardInterrupt:
        return EXIT_AFTER_CTRL_C
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        if dht is not None:
            dht.shutdown()


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _raise_terminated(_signum: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _serve_http(dht: SwarmDHT, listener: socket.socket, address_file: str | os.PathLike[str] | None) -> None:
    maddrs = visible_maddrs(dht)
    peer_id = maddrs[0].rpartition("/")[2]
    url = _url_of(listener)
    logger.info("bootstrap server of peer %s listens on %s", peer_id, url)
    for maddr in maddrs:
        logger.info("visible address: %s", maddr)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(dht, peer_id=peer_id),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=3,
        )
    )
    if address_file is None:
        server.run(sockets=[listener])
        return
    _write_atomically(Path(address_file), {"url": url, "peer_id": peer_id, "initial_peers": maddrs})
    try:
        server.run(sockets=[listener])
    finally:
        Path(address_file).unlink(missing_ok=True)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        code = getattr(error, "errno", None) or 0
        reason = os.strerror(code) if code > 0 else error  # a name that cannot be resolved has a negative code
        raise UserError(f"cannot listen on {host} port {port}: {reason}") from error


def _url_of(listener: socket.socket) -> str:
    """A URL that works on this machine, also when the server listens on all interfaces."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    try:
        with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, path)
    except OSError as error:
        with suppress(NameError, OSError):
            os.unlink(file.name)
        raise UserError(f"cannot write the address file {path}: {error.strerror}") from error
