"""What a miner exposes.

Surprising fact: histograms and counters of rounds are made from the list of all rounds when somebody asks, so a round
that ended while nobody looked is not lost.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from hivetrain.averaging.report import Outcome, RoundReport

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES = {
    "swarm_epoch": "Global updates so far.",
    "loss": "Training loss of the last microbatch.",
    "tokens_per_second": "Tokens that this miner trains on in a second, over its last microbatches.",
    "peers": "Live peers of the run, this one included.",
    "swarm_samples": "Samples of all peers towards the next global update.",
    "target_samples": "Samples that make one global update.",
}


@dataclass(frozen=True)
class MinerState:
    """A miner at one moment. None is what there is not, and is left out.

    Attributes:
        identity: labels of the info metric, such as ``run_id`` and ``peer_id``.
        swarm_epoch: finished global updates.
        loss: of the last microbatch.
        tokens: trained on in this fit.
        tokens_per_second: over the last microbatches.
        peers: live peers of the run.
        swarm_samples: of all peers towards the next update.
        target_samples: that make one update.
        samples: by what became of them: ``contributed``, ``dropped``, ``skipped``.
        rounds: all attempts at a global update, oldest first.
        counts: of the incentive network, by name.
        joules: used by component; None where nobody asked, empty where the machine has no counter.
    """

    identity: Mapping[str, str]
    swarm_epoch: int
    loss: float | None
    tokens: int
    tokens_per_second: float | None
    peers: int | None = None
    swarm_samples: int | None = None
    target_samples: int | None = None
    samples: Mapping[str, int] = field(default_factory=dict)
    rounds: Sequence[RoundReport] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    joules: Mapping[str, float] | None = None


class MinerMetrics(Collector):
    """Turns a miner's state into metrics whenever they are asked for.

    Args:
        registry: where to register.
        read: the state now, or None before and after training. Called on the server's threads.
    """

    def __init__(self, registry: CollectorRegistry, read: Callable[[], MinerState | None]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._seen = 0
        self._rounds = Counter(
            "hivetrain_miner_rounds", "Attempts at a global update, by how they ended.", ["outcome"], registry=None
        )
        for outcome in Outcome:
            self._rounds.labels(outcome)
        self._bytes = Counter(
            "hivetrain_miner_exchanged_bytes", "Payload exchanged with other members.", ["direction"], registry=None
        )
        for direction in ("sent", "received"):
            self._bytes.labels(direction)
        self._matchmaking = Histogram(
            "hivetrain_miner_matchmaking_seconds",
            "Time until a group was found or given up.",
            buckets=SECONDS,
            registry=None,
        )
        self._exchange = Histogram(
            "hivetrain_miner_exchange_seconds", "Time of exchange and vote.", buckets=SECONDS, registry=None
        )
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing: a state is not asked for before the first request."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All metrics, of now."""
        state = self._read()
        if state is None:
            return
        with self._lock:
            self._count(state.rounds)
        yield InfoMetricFamily("hivetrain_miner", "Who mines here.", dict(state.identity))
        for name, text in _GAUGES.items():
            value = getattr(state, name)
            if value is not None:
                yield GaugeMetricFamily(f"hivetrain_miner_{name}", text, value)
        yield CounterMetricFamily("hivetrain_miner_tokens", "Tokens that this miner trained on.", state.tokens)
        samples = CounterMetricFamily(
            "hivetrain_miner_samples", "Samples of this miner, by what became of their gradients.", labels=["fate"]
        )
        for fate, number in state.samples.items():
            samples.add_metric([fate], number)
        yield samples
        for metric in (self._rounds, self._bytes, self._matchmaking, self._exchange):
            yield from metric.collect()
        yield from _last_round(state.rounds)
        for name, value in state.counts.items():
            text = f"{name.replace('_', ' ').capitalize()}, as this miner counts for the incentive network."
            yield CounterMetricFamily(f"hivetrain_miner_{name}", text, value)
        yield from _energy(state.joules)

    def _count(self, rounds: Sequence[RoundReport]) -> None:
        if len(rounds) < self._seen:  # another fit
            self._seen = 0
        for report in rounds[self._seen :]:
            self._rounds.labels(report.outcome).inc()
            self._bytes.labels("sent").inc(report.bytes_sent)
            self._bytes.labels("received").inc(report.bytes_received)
            self._matchmaking.observe(report.matchmaking_s)
            if report.exchange_s > 0:
                self._exchange.observe(report.exchange_s)
        self._seen = len(rounds)


def _last_round(rounds: Sequence[RoundReport]) -> Iterable[Metric]:
    if rounds:
        yield GaugeMetricFamily(
            "hivetrain_miner_group_size", "Members that exchanged in the last round.", rounds[-1].group_size
        )
        yield GaugeMetricFamily(
            "hivetrain_miner_received_ratio", "Share of the last round's average received.", rounds[-1].fraction
        )


def _energy(joules: Mapping[str, float] | None) -> Iterable[Metric]:
    if joules is None:
        return
    yield GaugeMetricFamily(
        "hivetrain_miner_energy_available", "Whether this machine has an energy counter.", float(bool(joules))
    )
    used = CounterMetricFamily(
        "hivetrain_miner_energy_joules", "Energy used, self-reported: never part of a score.", labels=["component"]
    )
    for component, value in joules.items():
        used.add_metric([component], value)
    yield used
