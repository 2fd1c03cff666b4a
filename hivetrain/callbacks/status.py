"""Tells whoever watches the run how this miner is doing: a small record in the DHT, anew every few seconds.

Surprising fact: training never waits for it. The training thread leaves tensors behind; another thread turns them into
numbers, which on a GPU means waiting for it, and talks to the DHT. What the DHT does not take is told the next time.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from hivetrain.averaging.loop import Interrupted
from hivetrain.callbacks.report import held_out_loss
from hivetrain.callbacks.swarm_view import swarm_epoch
from hivetrain.errors import UserError
from hivetrain.monitor.status import STATUS_TTL_S, EpochNote, RoundNote, Status, clipped, status_key

logger = logging.getLogger(__name__)

_NOTES = 8  # epochs and rounds in a record
_STORE_S = 5.0
_END_S = 2.0


class SwarmStatus(Callback):
    """Publishes this miner's status record, for ``hivetrain dashboard`` and others who watch.

    Nothing in it is secret and nothing is decided by it. It names the hotkey if a ``ContributionPublisher`` is among
    the callbacks, and the energy used if an ``EnergyUse`` is.

    Args:
        every_s: seconds between two records at most; each swarm epoch has one besides, but no two within a second.
        heldout_every: measure the loss on validation data every so many swarm epochs; 0 takes only what Lightning's own
            validation logs as ``val/loss``. Training waits for the measurement.
        heldout_batches: batches of validation data for it.
    """

    def __init__(
        self,
        every_s: float = 10.0,
        heldout_every: int = 0,
        heldout_batches: int = 4,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if every_s < 1 or heldout_every < 0 or heldout_batches < 1:
            raise UserError("status.every_s and heldout_batches must be at least 1, heldout_every at least 0")
        self.every_s, self.heldout_every, self.heldout_batches = every_s, heldout_every, heldout_batches
        self._clock = clock
        self._lock = threading.Lock()
        self._due, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._hotkey: str | None = None
        self._epoch = 0
        self._heldout: tuple[float, int] | None = None
        self._samples = self._tokens = self._samples_before = 0
        self._losses: list[Tensor] = []
        self._ended: deque[tuple[int, list[Tensor], int]] = deque(maxlen=_NOTES)
        self._epochs: deque[EpochNote] = deque(maxlen=_NOTES)
        self._last_loss: float | None = None
        self._counted = (0, 0.0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy without a swarm: there would be nobody to tell."""
        if stage == "fit" and not hasattr(type(trainer.strategy), "publish_own"):
            raise UserError("the status callback needs trainer.strategy HivemindStrategy: leave status out")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to publish."""
        self._samples = self._tokens = self._samples_before = 0
        self._losses, self._last_loss, self._counted = [], None, (0, self._clock())
        self._ended.clear()
        self._epochs.clear()
        self._heldout, self._hotkey = None, _hotkey(trainer)
        self._due.clear()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._publish_forever, args=(trainer,), name="status", daemon=True)
        self._thread.start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the swarm epoch, which a strategy restores after ``on_train_start``."""
        self._epoch = swarm_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the microbatch, and have a record published where it ended a swarm epoch."""
        inputs, epoch = batch["input_ids"], swarm_epoch(trainer)
        with self._lock:
            self._losses.append(outputs["loss"].detach())
            self._samples += inputs.shape[0]
            self._tokens += inputs.numel()
            ended = epoch != self._epoch
            if ended:
                self._ended.append((self._epoch, self._losses, self._samples - self._samples_before))
                self._losses, self._samples_before, self._epoch = [], self._samples, epoch
        if not ended:
            return
        if self.heldout_every and epoch % self.heldout_every == 0:
            measured = held_out_loss(trainer, pl_module, self.heldout_batches)
            self._heldout = None if measured is None else (measured, epoch)
        self._due.set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what validation has logged."""
        measured = trainer.callback_metrics.get("val/loss")
        if measured is not None and not trainer.sanity_checking:
            self._heldout = float(measured), swarm_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish a last record; waits two seconds at most."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop at once."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop."""
        self._stop()

    def _stop(self) -> None:
        self._stopped.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join(_END_S)
            self._thread = None

    def _publish_forever(self, trainer: Trainer) -> None:
        failures = 0
        strategy: Any = trainer.strategy
        while True:
            ending = self._stopped.is_set()
            try:
                record = self._record(trainer).to_bytes()
                taken = strategy.publish_own(
                    status_key(strategy.run_id), record, self._clock() + STATUS_TTL_S, 1.0 if ending else _STORE_S
                )
                failures = 0 if taken else failures + 1
                if failures == 3:
                    logger.warning("the DHT does not take this miner's status; dashboards will not show it")
            except Interrupted:
                return
            except Exception:  # the thread's boundary: whatever it is, training goes on
                if not self._stopped.is_set():
                    logger.exception("the status could not be published; training goes on")
            if ending:
                return
            self._stopped.wait(1.0)
            self._due.wait(self.every_s - 1.0)
            self._due.clear()

    def _record(self, trainer: Trainer) -> Status:
        strategy: Any = trainer.strategy
        now = self._clock()
        with self._lock:
            ended, running = list(self._ended), self._losses[-1:]
            self._ended.clear()
            samples, tokens = self._samples, self._tokens
        for epoch, losses, count in ended:
            self._epochs.append(EpochNote(epoch, _mean(losses), count))
        tokens_before, since = self._counted
        self._counted = tokens, now
        if running or ended:
            self._last_loss = _mean(running or ended[-1][1])
        rounds = list(enumerate(strategy.rounds))[-_NOTES:]
        cursor, windows = _cursor(trainer)
        heldout = self._heldout
        return Status(
            at=now,
            swarm_epoch=swarm_epoch(trainer),
            loss=self._last_loss,
            heldout_loss=heldout[0] if heldout else None,
            heldout_epoch=heldout[1] if heldout else 0,
            samples=samples,
            tokens=tokens,
            tokens_per_s=max(0.0, (tokens - tokens_before) / max(now - since, 1e-3)),
            device=clipped(_device(strategy), 64),
            hotkey=self._hotkey,
            energy_j=_energy(trainer),
            data_pass=getattr(cursor, "data_pass", 0),
            window=getattr(cursor, "window", 0),
            n_windows=windows,
            epochs=tuple(self._epochs),
            rounds=tuple(RoundNote.of(number, report) for number, report in rounds),
        )


def _mean(losses: list[Tensor]) -> float | None:
    return float(torch.stack(losses).float().mean()) if losses else None


def _device(strategy: Any) -> str:
    device: torch.device = strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _hotkey(trainer: Trainer) -> str | None:
    """Address of the hotkey of a callback that publishes contributions, known by its face rather than by its class."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "wallet") and getattr(callback, "uid", None) is not None:
            return str(callback.wallet.address())
    return None


def _energy(trainer: Trainer) -> float | None:
    """Joules of a callback that measures them as ``EnergyUse`` does, known by its face too."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        joules = getattr(callback, "energy_j", None)
        if joules is not None:
            return float(joules)
    return None


def _cursor(trainer: Trainer) -> tuple[Any, int]:
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "cursor", None), getattr(getattr(data, "assignment", None), "n_windows", 0)
