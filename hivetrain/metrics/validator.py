"""What a validator exposes."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from hivetrain.validator.watch import ValidatorWatcher

SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)


class ValidatorMetrics(ValidatorWatcher):
    """Told by a validator what it does, from any thread.

    Args:
        registry: where to register.
        verdicts: all that a contribution can be judged as; each is a series from the start.
        statuses: all that can become of a tempo's weights.
    """

    def __init__(self, registry: CollectorRegistry, verdicts: Iterable[str], statuses: Iterable[str]) -> None:
        self._info = Info("hivetrain_validator", "Who validates here.", registry=registry)
        self._block = Gauge("hivetrain_validator_block", "The chain's block as last seen.", registry=registry)
        self._epoch = Gauge("hivetrain_validator_swarm_epoch", "Swarm epoch that was followed last.", registry=registry)
        self._miners = Gauge("hivetrain_validator_miners", "Miners with a weight above zero.", registry=registry)
        self._open = Gauge("hivetrain_validator_open_contributions", "Still without a verdict.", registry=registry)
        self._contributions = Counter(
            "hivetrain_validator_contributions", "Contributions judged, by verdict.", ["verdict"], registry=registry
        )
        self._samples = Counter(
            "hivetrain_validator_samples",
            "Samples in judged contributions, by verdict.",
            ["verdict"],
            registry=registry,
        )
        for verdict in verdicts:
            self._contributions.labels(verdict)
            self._samples.labels(verdict)
        self._audits = Histogram(
            "hivetrain_validator_audit_seconds", "Time of one replay.", buckets=SECONDS, registry=registry
        )
        self._polls = Histogram(
            "hivetrain_validator_poll_seconds", "Time of one look at the run.", buckets=SECONDS, registry=registry
        )
        self._failures = Counter("hivetrain_validator_failures", "What did not answer.", ["source"], registry=registry)
        for source in ("chain", "dht", "data"):
            self._failures.labels(source)
        self._rounds = Counter(
            "hivetrain_validator_rounds", "Rounds by how their sums of sketches compare.", ["sums"], registry=registry
        )
        for outcome in ("agrees", "differs", "unchecked"):
            self._rounds.labels(outcome)
        self._weights = Counter(
            "hivetrain_validator_weights", "Weights of tempos, by what became of them.", ["status"], registry=registry
        )
        for status in statuses:
            self._weights.labels(status)
        self._set_at = Gauge(
            "hivetrain_validator_weights_timestamp_seconds", "When weights were set last, Unix time.", registry=registry
        )

    def began(self, run_id: str, hotkey: str, uid: int | None) -> None:
        """The validator knows who it is."""
        self._info.info({"run_id": run_id, "hotkey": hotkey, "uid": "" if uid is None else str(uid)})

    def polled(self, block: int, swarm_epoch: int, open_contributions: int, seconds: float) -> None:
        self._block.set(block)
        self._epoch.set(swarm_epoch)
        self._open.set(open_contributions)
        self._polls.observe(seconds)

    def failed(self, source: str) -> None:
        self._failures.labels(source).inc()

    def audited(self, seconds: float) -> None:
        self._audits.observe(seconds)

    def judged(self, verdict: str, samples: int) -> None:
        self._contributions.labels(verdict).inc()
        self._samples.labels(verdict).inc(samples)

    def compared(self, outcome: str) -> None:
        self._rounds.labels(outcome).inc()

    def weighed(self, status: str, miners: int) -> None:
        self._weights.labels(status).inc()
        self._miners.set(miners)
        if status in ("set", "sealed"):
            self._set_at.set_to_current_time()
