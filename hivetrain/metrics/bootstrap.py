"""What a bootstrap server exposes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class BootstrapState:
    """A bootstrap's DHT peer at one moment.

    Attributes:
        peer_id: its name.
        serving: whether it answers.
        dht_peers: other peers in its routing table.
        links: number of other bootstrap servers by the state of the link to them.
    """

    peer_id: str
    serving: bool
    dht_peers: int
    links: Mapping[str, int]


class BootstrapMetrics(Collector):
    """Turns a bootstrap's state into metrics whenever they are asked for.

    Args:
        registry: where to register.
        read: the state now. Called on the server's threads.
    """

    def __init__(self, registry: CollectorRegistry, read: Callable[[], BootstrapState]) -> None:
        self._read = read
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the DHT is not asked before the first request."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All metrics, of now."""
        state = self._read()
        yield InfoMetricFamily("hivetrain_bootstrap", "Which DHT peer this is.", {"peer_id": state.peer_id})
        yield GaugeMetricFamily("hivetrain_bootstrap_serving", "Whether the DHT peer answers.", float(state.serving))
        links = GaugeMetricFamily("hivetrain_bootstrap_links", "Other bootstrap servers, by state.", labels=["state"])
        for name, number in state.links.items():
            links.add_metric([name], number)
        yield links
        if state.serving:
            yield GaugeMetricFamily(
                "hivetrain_bootstrap_dht_peers", "Other peers in the routing table.", state.dht_peers
            )
