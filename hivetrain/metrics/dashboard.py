"""What a dashboard exposes."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hivetrain.metrics.requests import request_histogram

SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30)
SOURCES = ("dht", "chain")


class DashboardMetrics:
    """Told by a dashboard what it does, from any thread.

    Its ``requests`` are for ``app.add_middleware(CountedRequests, histogram=metrics.requests)``.

    Args:
        registry: where to register.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests: Histogram = request_histogram("dashboard", registry)
        self._viewers = Gauge("hivetrain_dashboard_viewers", "Open event streams.", registry=registry)
        self._reads = Histogram(
            "hivetrain_dashboard_read_seconds", "Time of one look at a source.", ["source"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._failures = Counter(
            "hivetrain_dashboard_read_failures", "Looks at a source that failed.", ["source"], registry=registry
        )
        self._read_at = Gauge(
            "hivetrain_dashboard_read_timestamp_seconds", "Last good look, Unix time.", ["source"], registry=registry
        )
        for source in SOURCES:
            self._reads.labels(source)
            self._failures.labels(source)
            self._read_at.labels(source)
        self._history = Gauge("hivetrain_dashboard_history_bytes", "Size of the history's file.", registry=registry)
        self._epoch = Gauge("hivetrain_dashboard_swarm_epoch", "Newest swarm epoch seen.", registry=registry)
        self._peers = Gauge("hivetrain_dashboard_peers", "Peers seen in the last look.", registry=registry)

    @contextmanager
    def viewer(self) -> Iterator[None]:
        """Around one event stream."""
        with self._viewers.track_inprogress():
            yield

    @contextmanager
    def reading(self, source: str) -> Iterator[None]:
        """Around one look at ``dht`` or ``chain``; an exception counts as a failure and goes on."""
        began = perf_counter()
        with self._failures.labels(source).count_exceptions():
            yield
        self._reads.labels(source).observe(perf_counter() - began)
        self._read_at.labels(source).set_to_current_time()

    def saw(self, swarm_epoch: int, peers: int) -> None:
        """The run as it was found."""
        self._epoch.set(swarm_epoch)
        self._peers.set(peers)

    def stored(self, size_bytes: int) -> None:
        """The history's file has this size."""
        self._history.set(size_bytes)
