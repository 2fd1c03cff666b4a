"""The bootstrap server: a long-lived DHT peer that tells newcomers over HTTP how to reach it.

It trains nothing, knows no chain and is trusted with nothing. The surprising fact: it listens for an instant before it
joins, to learn of a taken port at once, and again afterwards, for the DHT's process must not inherit the socket.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain import serving
from hivetrain.bootstrap_dial import DialLimits, DialRefused, dial_back, parse_target
from hivetrain.bootstrap_links import Links, LinkState, check_others
from hivetrain.bootstrap_node import start_node
from hivetrain.bootstrap_view import PeerView
from hivetrain.metrics import (
    BootstrapMetrics,
    BootstrapState,
    CountedRequests,
    MetricsServer,
    new_registry,
    request_histogram,
)
from hivetrain.swarm import DEFAULT_HOST_MADDRS, DHTUnavailableError, SwarmDHT, visible_maddrs

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 512


def create_app(
    dht: SwarmDHT,
    *,
    peer_id: str,
    links: Links | None = None,
    view: PeerView | None = None,
    relay: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The HTTP side of a running DHT peer.

    ``GET /return_dht_address`` answers ``{"initial_peers": [multiaddr, ...]}``. ``GET /health`` answers ``status``
    (``ok``, ``split`` when another bootstrap lives in a DHT of its own, ``unavailable``), ``peer_id``, ``uptime_s``,
    ``dht_peers``, the number of other peers in the routing table, ``last_seen`` and ``bootstraps``. Both have status
    503 and a ``reason`` when the DHT is dead or does not answer. ``POST /dial_back?port=PORT&peer_id=ID`` dials the
    requester's own address and answers ``{"reachable": true or false}``.
    """
    app = FastAPI(title="hivetrain bootstrap", docs_url=None, redoc_url=None, openapi_url=None)
    view = view or PeerView(dht, clock)
    limits = DialLimits(clock)
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
        others = links.read() if links else []
        report = {
            "peer_id": peer_id,
            "uptime_s": round(clock() - started_at, 1),
            "dht_peers": peer.known_peers,
            "relay": relay,
            "marker": links.marker if links else None,
            "bootstraps": [{"name": link.shown, "peer_id": link.peer_id, "state": link.state} for link in others],
            "last_seen": [asdict(sighting) for sighting in view.last_seen()],
        }
        if peer.fault:
            return JSONResponse({"status": "unavailable", "reason": peer.fault, **report}, status_code=503)
        split = any(link.state is LinkState.SPLIT for link in others)
        return JSONResponse({"status": "split" if split else "ok", **report})

    @app.post("/dial_back")
    def answer_dial_back(request: Request, port: str = "", peer_id: str = "") -> JSONResponse:
        try:
            if {"forwarded", "x-forwarded-for", "x-real-ip"} & set(request.headers):
                raise DialRefused(409, "a proxy stands between: the address to dial cannot be known")
            host = request.client.host if request.client else ""
            target = parse_target(host, int(port) if port.isascii() and port.isdigit() else None, peer_id)
            with limits.one(target.host):
                return JSONResponse({"reachable": dial_back(dht, target), "address": target.maddr})
        except DialRefused as refusal:
            return JSONResponse({"reason": str(refusal)}, status_code=refusal.status)
        except DHTUnavailableError as error:
            return JSONResponse({"reason": str(error)}, status_code=503)

    return app


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    identity_path: str | os.PathLike[str] | None = None,
    host_maddrs: Sequence[str] = DEFAULT_HOST_MADDRS,
    announce_maddrs: Sequence[str] | None = None,
    initial_peers: Sequence[str] | str = (),
    relay: bool = False,
    address_file: str | os.PathLike[str] | None = None,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
) -> int:
    """Run a bootstrap server until SIGTERM or Ctrl-C. Call it on the main thread.

    Args:
        host: where to listen for HTTP.
        port: port for HTTP; 0 picks a free one.
        identity_path: key file that makes the peer id permanent; created when missing.
        host_maddrs: where the DHT peer listens; a fixed port keeps its address over restarts.
        announce_maddrs: external addresses to announce, and to answer with, instead.
        initial_peers: URLs of the other bootstraps, or peers of the swarm. None of them needs to be up: they are
            looked for all the time, and joined whenever they are not in this DHT.
        relay: carry traffic for peers that nobody can dial.
        address_file: JSON file with ``url``, ``peer_id`` and ``initial_peers``, complete from the moment it exists;
            written when the server listens, removed when it ends.
        metrics_port: where to serve Prometheus metrics; None: nowhere.
        metrics_host: the interface for them.

    Returns:
        The exit status after SIGTERM: 0.

    Raises:
        UserError: the port is taken, the swarm cannot be joined, or an argument is unusable.
        KeyboardInterrupt: Ctrl-C, once all is closed.
    """
    others = check_others([initial_peers] if isinstance(initial_peers, str) else initial_peers)
    registry = new_registry("bootstrap")
    metrics = MetricsServer(metrics_port, metrics_host, registry) if metrics_port is not None else None
    with serving.until_signal() as opened:
        if metrics is not None:
            metrics.check()
        serving.listen(host, port).close()
        if address_file is not None:
            Path(address_file).unlink(missing_ok=True)  # left by one that was killed
        validator = RSASignatureValidator(RSAPrivateKey())
        dht = start_node(host_maddrs, announce_maddrs, identity_path, relay=relay, validator=validator)
        opened.callback(dht.shutdown)
        peer_id = visible_maddrs(dht)[0].rpartition("/")[2]
        view = PeerView(dht)
        links = Links(dht, peer_id, validator.local_public_key, others, on_look=view.read)
        opened.callback(links.stop)
        links.start()
        app = create_app(dht, peer_id=peer_id, links=links, view=view, relay=relay)
        app.add_middleware(CountedRequests, histogram=request_histogram("bootstrap", registry))
        BootstrapMetrics(registry, partial(_state, peer_id, view, links))
        with serving.listen(host, port) as listener, metrics or nullcontext():
            _serve_http(app, dht, listener, address_file)
    return 0


def _state(peer_id: str, view: PeerView, links: Links) -> BootstrapState:
    peer, states = view.read(), [link.state for link in links.read()]
    return BootstrapState(
        peer_id, not peer.fault, peer.known_peers, {state: states.count(state) for state in LinkState}
    )


def _serve_http(
    app: FastAPI, dht: SwarmDHT, listener: socket.socket, address_file: str | os.PathLike[str] | None
) -> None:
    maddrs = visible_maddrs(dht)
    peer_id = maddrs[0].rpartition("/")[2]
    url = serving.url_of(listener)
    logger.info("bootstrap server of peer %s listens on %s", peer_id, url)
    for maddr in maddrs:
        logger.info("visible address: %s", maddr)
    content = json.dumps({"url": url, "peer_id": peer_id, "initial_peers": maddrs})
    with serving.address_file(address_file, content):
        uvicorn.Server(serving.http_config(app, MAX_CONNECTIONS)).run(sockets=[listener])
