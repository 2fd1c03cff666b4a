"""Runs the dashboard: joins the DHT as a client, follows the run, serves the page, ends on a signal.

Surprising fact: a browser holds its event stream open for ever, so the streams are told to end before uvicorn waits for
its connections.
"""

import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import FrameType
from urllib.parse import quote

import uvicorn
from fastapi import FastAPI

from hivetrain import serving
from hivetrain.chain.address import open_chain
from hivetrain.dashboard.app import MAX_STREAMS, create_app
from hivetrain.errors import UserError
from hivetrain.metrics import DashboardMetrics, MetricsServer, new_registry
from hivetrain.monitor.collector import Collector
from hivetrain.monitor.feed import Feed
from hivetrain.monitor.history import History
from hivetrain.monitor.reader import RunReader
from hivetrain.swarm import DHTUnavailableError, SwarmDHT, count_known_peers, resolve_initial_peers, start_dht

logger = logging.getLogger(__name__)

STATE_DIR = "~/.local/state/hivetrain"


@dataclass(frozen=True)
class Options:
    """What to show, and where.

    Args:
        run_id: name of the run.
        initial_peers: multiaddrs or bootstrap URLs; None: from the environment.
        chain: address of the chain; None without one.
        host: where to listen for HTTP.
        port: port for HTTP; 0 picks a free one.
        db: file of the history; None: one for each run under ``STATE_DIR``; ``:memory:``: none.
        address_file: file that gets the URL once the server listens; removed at the end.
        interval_s: seconds between two readings of the DHT.
        metrics_port: where to serve Prometheus metrics; None: nowhere.
        metrics_host: the interface for them.
    """

    run_id: str
    initial_peers: Sequence[str] | None = None
    chain: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    db: str | None = None
    address_file: str | None = None
    interval_s: float = 2.0
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"


def serve(options: Options) -> int:
    """Runs until SIGTERM or Ctrl-C. Call it on the main thread.

    Returns:
        The exit status after SIGTERM: 0.

    Raises:
        UserError: the port is taken, the swarm cannot be joined, or an argument is unusable.
        KeyboardInterrupt: Ctrl-C, once all is closed.
    """
    with serving.until_signal() as opened:
        _serve(options, opened)
    return 0


def default_db(run_id: str) -> str:
    """The history's file where none is named."""
    return f"{STATE_DIR}/dashboard-{quote(run_id, safe='')}.sqlite3"


class _Server(uvicorn.Server):
    """Tells the streams to end as soon as a signal arrives."""

    closing: threading.Event

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.closing.set()
        super().handle_exit(sig, frame)


def _serve(options: Options, stack: ExitStack) -> None:
    history = History(options.db or default_db(options.run_id), options.run_id)
    history.open()  # what is wrong is said now; the DHT's forked process must inherit neither file nor listener
    history.close()
    serving.listen(options.host, options.port).close()
    registry = new_registry("dashboard")
    server = None
    if options.metrics_port is not None:
        server = MetricsServer(options.metrics_port, options.metrics_host, registry)
        server.check()
    metrics = DashboardMetrics(registry)
    chain = None
    if options.chain:
        chain = open_chain(options.chain), options.chain
        stack.callback(chain[0].close)
    peers = list(options.initial_peers) if options.initial_peers else None
    maddrs = resolve_initial_peers(peers)
    if not maddrs:
        raise UserError("pass --initial-peers: the URL of the run's bootstrap server, or a peer's multiaddr")
    dht = start_dht(maddrs, client_mode=True)
    stack.callback(dht.shutdown)
    history.open()
    stack.callback(history.close)
    closing = threading.Event()
    reader = RunReader(dht, options.run_id, give_up=closing.is_set)
    reader.open()
    stack.callback(reader.close)
    feed = Feed()
    collector = Collector(
        reader, history, feed, chain, options.interval_s, peers_known=lambda: _known_peers(dht), metrics=metrics
    )
    stack.callback(collector.stop)
    stack.callback(closing.set)
    collector.start()
    app = create_app(feed, history, closing, metrics)
    with serving.listen(options.host, options.port) as listener, server or nullcontext():
        _serve_http(options, app, closing, listener)


def _serve_http(options: Options, app: FastAPI, closing: threading.Event, listener: socket.socket) -> None:
    server = _Server(serving.http_config(app, 4 * MAX_STREAMS))
    server.closing = closing
    url = serving.url_of(listener)
    logger.info("dashboard of run %r: %s", options.run_id, url)
    with serving.address_file(options.address_file, url):
        server.run(sockets=[listener])


def _known_peers(dht: SwarmDHT) -> int:
    try:
        return count_known_peers(dht, timeout_s=2.0)
    except DHTUnavailableError:
        return 0
