"""A miner's Prometheus metrics.

Surprising fact: the training thread only counts tokens and keeps the last loss; everything else is read off strategy
and callbacks on the server's thread, and only when somebody asks.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from hivetrain.callbacks.energy import EnergyUse
from hivetrain.callbacks.swarm_view import swarm_epoch, swarm_of
from hivetrain.metrics import MetricsServer, MinerMetrics, MinerState, new_registry

_WINDOW = 64  # microbatches
_FATES = ("contributed", "dropped", "skipped")


class SwarmMetrics(Callback):
    """Serves ``http://HOST:PORT/metrics`` while a miner trains.

    Args:
        port: where to listen; 0 picks a free port and logs it.
        host: the interface; there is no authentication, so only loopback unless something protects it.
        clock: Monotonic seconds.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", clock: Callable[[], float] = time.monotonic) -> None:
        self.port, self.host = port, host
        self._clock = clock
        self._server: MetricsServer | None = None
        self._tokens = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._loss: Any = None

    @property
    def url(self) -> str | None:
        """Where the metrics are; None unless training."""
        return self._server.url if self._server is not None else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a port that is taken."""
        if stage == "fit":
            MetricsServer(self.port, self.host, new_registry("miner")).check()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to serve: after the strategy has forked its DHT, which must not inherit the socket."""
        self._tokens, self._loss = 0, None
        self._marks.clear()
        self._marks.append((self._clock(), 0))
        registry = new_registry("miner")
        MinerMetrics(registry, lambda: self.state(trainer))
        self._server = MetricsServer(self.port, self.host, registry).start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what costs nothing to note."""
        self._tokens += batch["input_ids"].numel()
        self._marks.append((self._clock(), self._tokens))
        self._loss = outputs["loss"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop serving."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop serving."""
        self._stop()

    def state(self, trainer: Trainer) -> MinerState:
        """The miner as it is now."""
        began, tokens_then = self._marks[0]
        elapsed_s = self._clock() - began
        loss = self._loss
        state = MinerState(
            identity={"run_id": "", "peer_id": "", "uid": _uid(trainer)},
            swarm_epoch=swarm_epoch(trainer),
            loss=None if loss is None else float(loss.detach()),  # waits for the device, but not on its thread
            tokens=self._tokens,
            tokens_per_second=(self._tokens - tokens_then) / elapsed_s if elapsed_s > 0 else None,
            counts=_counts(trainer),
            joules=next((own.joules for own in _callbacks(trainer) if isinstance(own, EnergyUse)), None),
        )
        strategy: Any = swarm_of(trainer)
        if strategy is None:
            return state
        return replace(
            state,
            identity={**state.identity, "run_id": strategy.run_id, "peer_id": strategy.peer_id or ""},
            peers=strategy.num_peers,
            swarm_samples=strategy.samples_accumulated,
            target_samples=strategy.target_batch_size,
            samples={fate: getattr(strategy, f"samples_{fate}") for fate in _FATES},
            rounds=strategy.rounds,
        )

    def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer, "callbacks", []))


def _publisher(trainer: Trainer) -> Any:
    """The callback that counts a miner's work for the incentive network, whichever it is."""
    return next(
        (own for own in _callbacks(trainer) if callable(getattr(getattr(own, "counts", None), "metrics", None))), None
    )


def _counts(trainer: Trainer) -> dict[str, float]:
    publisher = _publisher(trainer)
    metrics = {} if publisher is None else publisher.counts.metrics()
    return {name.removeprefix("chain/"): value for name, value in metrics.items()}


def _uid(trainer: Trainer) -> str:
    uid = getattr(_publisher(trainer), "uid", None)
    return "" if uid is None else str(uid)
