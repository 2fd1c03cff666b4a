"""Console progress: a live table on a terminal, plain log lines elsewhere.

Surprising fact: it is a Lightning ``ProgressBar``, which is how Lightning knows not to add its own.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.live import Live
from rich.table import Table

from hivetrain.callbacks.swarm_view import swarm_epoch, swarm_of
from hivetrain.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """One moment of a run. What only a swarm has is None outside one."""

    swarm_epoch: int
    loss: float | None
    tokens_per_s: float
    peers: int | None = None
    samples: int | None = None
    target: int | None = None
    exchange_s: float | None = None

    def cells(self) -> dict[str, str]:
        """Column titles and texts, in the order in which they are shown."""
        return {
            "swarm epoch": str(self.swarm_epoch),
            "loss": "-" if self.loss is None else f"{self.loss:.4f}",
            "tokens/s": f"{self.tokens_per_s:,.0f}",
            "peers": "-" if self.peers is None else str(self.peers),
            "samples": "-" if self.target is None else f"{self.samples}/{self.target}",
            "exchange": "-" if self.exchange_s is None else f"{self.exchange_s:.2f} s",
        }

    def line(self) -> str:
        """The same on one line."""
        return "  ".join(f"{title} {text}" for title, text in self.cells().items())


class SwarmProgress(ProgressBar):
    """Shows swarm epoch, loss, this miner's tokens/s, peers, samples towards the target, time of the last exchange.

    Args:
        refresh_s: Seconds between two refreshes of the live table.
        line_every_s: Seconds between two plain lines; in a swarm each swarm epoch has its own besides.
        clock: Monotonic seconds.
        console: Where to write; None takes stderr.
    """

    def __init__(
        self,
        refresh_s: float = 0.5,
        line_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        if refresh_s <= 0 or line_every_s <= 0:
            raise UserError("progress.refresh_s and progress.line_every_s must be positive")
        self.refresh_s = refresh_s
        self.line_every_s = line_every_s
        self._clock = clock
        self._console = console
        self._live: Live | None = None
        self._enabled = True
        self._tokens = 0
        self._loss: Any = None
        self._shown_at = self._counted_from = 0.0
        self._shown_epoch = -1

    def disable(self) -> None:
        """Show nothing: Lightning's call on every process but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the addresses at which this peer is reached, and open the display."""
        swarm = swarm_of(trainer)
        if swarm is None:
            logger.info("%s trains alone: swarm epochs are its optimizer steps", type(trainer.strategy).__name__)
        else:
            addresses = ", ".join(str(address) for address in swarm.visible_maddrs)
            logger.info("peer %s is visible at %s", swarm.peer_id, addresses or "no address (client only)")
        self._shown_at = self._counted_from = self._clock()
        self._shown_epoch = swarm_epoch(trainer)
        console = self._console or Console(file=sys.stderr)
        if self._enabled and console.is_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens and show if it is time."""
        self._tokens += batch["input_ids"].numel()
        self._loss = outputs["loss"]
        waited = self._clock() - self._shown_at
        due = waited >= (self.refresh_s if self._live else self.line_every_s)
        new_epoch = swarm_of(trainer) is not None and swarm_epoch(trainer) != self._shown_epoch
        if self._enabled and (due or new_epoch):
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the display."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back before the error is printed."""
        self._close()

    def _show(self, trainer: Trainer) -> None:
        now = self._clock()
        progress = self._measure(trainer, now)
        self._shown_epoch = progress.swarm_epoch
        self._shown_at = self._counted_from = now
        self._tokens = 0
        if self._live is None:
            logger.info(progress.line())
            return
        table = Table(*progress.cells())
        table.add_row(*progress.cells().values())
        self._live.update(table, refresh=True)

    def _measure(self, trainer: Trainer, now: float) -> Progress:
        loss = None if self._loss is None else float(self._loss)
        tokens_per_s = self._tokens / max(now - self._counted_from, 1e-9)
        swarm = swarm_of(trainer)
        if swarm is None:
            return Progress(swarm_epoch(trainer), loss, tokens_per_s)
        return Progress(
            swarm_epoch=swarm.swarm_epoch,
            loss=loss,
            tokens_per_s=tokens_per_s,
            peers=swarm.num_peers,
            samples=swarm.samples_accumulated,
            target=swarm.target_batch_size,
            exchange_s=swarm.rounds[-1].exchange_s if swarm.rounds else None,
        )

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
