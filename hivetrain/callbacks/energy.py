"""Energy that a miner's machine uses while it trains, by its own counters: self-reported, and never part of a score.

Surprising fact: a processor's counter is the whole machine's, so two miners on one machine each report all of it, and
it starts again at zero within minutes or hours; so it is read every few seconds. Zeus would leave that to processes of
its own, which outlive a miner that is killed; only its search for counters and its files' limits are used here.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hivetrain.errors import UserError

logger = logging.getLogger(__name__)

STOP_S = 2.0


@dataclass(frozen=True)
class Counter:
    """One energy counter of the machine.

    Attributes:
        component: ``cpu``, ``dram`` or ``gpu``.
        read: joules since some moment; raises OSError if it is gone.
        range_j: where it starts again at zero; None if it does not.
    """

    component: str
    read: Callable[[], float]
    range_j: float | None = None


class EnergyMeter:
    """Adds up what counters say from ``start`` on. Safe on any thread.

    A counter that fails takes its component away: what is left of it would be too little.

    Args:
        counters: of this machine, several for a component if it has several processors.
    """

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = list(counters)
        self._lock = threading.Lock()
        self._last: dict[int, float] = {}
        self._joules: dict[str, float] = {}

    def start(self) -> None:
        """Count from now."""
        with self._lock:
            self._joules = {counter.component: 0.0 for counter in self._counters}
            for number, counter in enumerate(self._counters):
                with self._or_without(counter):
                    self._last[number] = counter.read()

    def read(self) -> dict[str, float]:
        """Joules by component since ``start``; without those that cannot be told."""
        with self._lock:
            for number, counter in enumerate(self._counters):
                if counter.component not in self._joules:
                    continue
                with self._or_without(counter):
                    now = counter.read()
                    used = now - self._last[number]
                    if used < 0 and counter.range_j is not None:
                        used += counter.range_j
                    if used < 0:
                        raise OSError(f"went back by {-used:.0f} J")
                    self._last[number] = now
                    self._joules[counter.component] += used
            return dict(self._joules)

    @contextmanager
    def _or_without(self, counter: Counter) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._joules.pop(counter.component, None)
            logger.warning("energy of %s is not available any more: %s", counter.component, error)


class EnergyUse(Callback):
    """Measures joules and joules per million tokens of a fit; self-reported, never part of a score.

    Loggers get ``self_reported/joules`` and ``self_reported/joules_per_million_tokens``, and nothing where the machine
    has no counter that may be read: that is not zero. Needs the extra ``energy``.

    Args:
        every_s: seconds from one reading to the next. Far less than the counters' range, which is minutes at the least.
        clock: Monotonic seconds.
    """

    def __init__(self, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < every_s <= 60:
            raise UserError(f"energy.every_s must be above 0 and at most 60, got {every_s}")
        self.every_s = every_s
        self.tokens = 0
        self._clock = clock
        self._meter: EnergyMeter | None = None
        self._reader: threading.Thread | None = None
        self._ended = threading.Event()
        self._log_at = 0.0

    @property
    def joules(self) -> Mapping[str, float]:
        """Joules since training began, by component; empty if not available."""
        return self._meter.read() if self._meter is not None else {}

    @property
    def energy_j(self) -> float | None:
        """Joules of all components that can be told; None if not available."""
        joules = self.joules
        return sum(joules.values()) if joules else None

    @property
    def joules_per_million_tokens(self) -> float | None:
        """By this miner's own tokens; None if not available or before the first."""
        joules = self.energy_j
        return None if joules is None or not self.tokens else joules / self.tokens * 1e6

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Miss the library before anything is spent on training."""
        if stage == "fit":
            _zeus()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the counters and begin to read them."""
        counters, missing = find_counters(trainer.strategy.root_device)
        if not counters:
            logger.info("energy is not available: %s", "; ".join(missing))
        self.tokens, self._log_at = 0, self._clock() + self.every_s
        self._meter = EnergyMeter(counters)
        self._meter.start()
        self._ended = threading.Event()
        if counters:
            self._reader = threading.Thread(target=self._read_often, name="energy", daemon=True)
            self._reader.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens, and log now and then."""
        self.tokens += batch["input_ids"].numel()
        if self._clock() >= self._log_at:
            self._log_at = self._clock() + self.every_s
            self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what all of it took."""
        self._log(trainer)
        joules, per_million = self.energy_j, self.joules_per_million_tokens
        if joules is not None and per_million is not None:
            parts = ", ".join(f"{component} {value:.0f} J" for component, value in self.joules.items())
            logger.info("energy, self-reported: %s; %.0f J per million tokens", parts, per_million)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop reading."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop reading; what was read stays."""
        self._stop()

    def _read_often(self) -> None:
        assert self._meter is not None
        while not self._ended.wait(self.every_s):
            self._meter.read()

    def _stop(self) -> None:
        self._ended.set()
        if self._reader is not None:
            self._reader.join(STOP_S)
            self._reader = None

    def _log(self, trainer: Trainer) -> None:
        joules, per_million = self.energy_j, self.joules_per_million_tokens
        if joules is None or per_million is None:
            return
        metrics = {"self_reported/joules": joules, "self_reported/joules_per_million_tokens": per_million}
        for sink in trainer.loggers:
            sink.log_metrics(metrics, step=trainer.global_step)


def find_counters(device: torch.device) -> tuple[list[Counter], list[str]]:
    """Counters of this machine's processors and memory, and of a training GPU; and why others are missing."""
    counters: list[Counter] = []
    missing: list[str] = []
    for find in (_processor_counters, _gpu_counters):
        try:
            counters += find(device)
        except _NoCounterError as error:
            missing.append(str(error))
    return counters, missing


class _NoCounterError(Exception):
    """A part of the machine has no counter that may be read."""


def _processor_counters(_device: torch.device) -> list[Counter]:
    rapl, errors = _zeus().device.cpu.rapl, _zeus().device.exception
    try:
        processors = rapl.RAPLCPUs().cpus
    except (errors.ZeusBaseCPUError, OSError) as error:
        raise _NoCounterError(f"processor: {error}") from error
    files = [("cpu", cpu.rapl_file) for cpu in processors]
    files += [("dram", cpu.dram) for cpu in processors if cpu.dram is not None]
    if not files:
        raise _NoCounterError("processor: RAPL lists none")
    return [_file_counter(component, Path(file.energy_uj_path), file.max_energy_range_uj) for component, file in files]


def _file_counter(component: str, path: Path, range_uj: float) -> Counter:
    return Counter(component, lambda: int(path.read_text()) / 1e6, range_uj / 1e6)


def _gpu_counters(device: torch.device) -> list[Counter]:
    if device.type != "cuda":
        return []
    gpu, errors = _zeus().device.gpu, _zeus().device.exception
    index = device.index or 0
    try:
        gpus = gpu.get_gpus()
        if not gpus.supports_get_total_energy_consumption(index):
            raise _NoCounterError(f"GPU: {gpus.get_name(index)} counts no energy")
        gpus.get_total_energy_consumption(index)
    except errors.ZeusBaseGPUError as error:
        raise _NoCounterError(f"GPU: {error}") from error

    def read() -> float:
        try:
            return gpus.get_total_energy_consumption(index) / 1e3
        except errors.ZeusBaseGPUError as error:
            raise OSError(str(error)) from error

    return [Counter("gpu", read)]


def _zeus() -> Any:
    """The optional library."""
    try:
        import zeus.device.cpu.rapl
        import zeus.device.exception
        import zeus.device.gpu
    except ImportError as error:
        raise UserError(
            "energy needs the library zeus: pip install 'hivetrain[energy]', or leave the key out"
        ) from error
    return zeus
