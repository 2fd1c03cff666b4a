"""How much of its samples per second a peer keeps in company, with the device's compute emulated.

Gradients of the emulated device cost little processor time and always the same wall-clock time, so that a few cores
carry several peers and what is left to see is the swarm itself: the wait for the others' last microbatch, matchmaking,
the exchange, the update.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from swarm_programs import Program, cpu_seconds, meeting_point, programs, questions, table

WIDTH = 1000
MICROBATCH = 8  # samples
MICROBATCH_S = 0.5
WARM_UP_SPEED, WARM_UP_SHARE = 5, 0.8  # how much faster, and for how much of the first epoch, which does not count
MEET_S = 60.0


@dataclass(frozen=True)
class Setting:
    """One run: so many peers, each with so many seconds of compute in an epoch."""

    num_peers: int
    epoch_s: float
    overlap: bool

    @property
    def run_id(self) -> str:
        return f"efficiency-{self.num_peers}-{1000 * self.epoch_s:.0f}-{'overlapped' if self.overlap else 'exact'}"

    @property
    def target(self) -> int:
        return self.num_peers * MICROBATCH * round(self.epoch_s / MICROBATCH_S)


def measure(epoch_seconds: Sequence[float], groups: Sequence[int], num_params: int, epochs: int) -> str:
    """A table of efficiencies, and of where the time of an epoch went."""
    rows = []
    with meeting_point() as addresses, programs(work, max(groups), num_params, addresses) as peers:
        for epoch_s in epoch_seconds:
            alone = _run(peers[:1], Setting(1, epoch_s, False), epochs)
            rows.append(_row(Setting(1, epoch_s, False), alone, alone["samples_per_s"]))
            for overlap in (False, True):
                for num_peers in groups:
                    setting = Setting(num_peers, epoch_s, overlap)
                    rows.append(_row(setting, _run(peers[:num_peers], setting, epochs), alone["samples_per_s"]))
    header = ["mode", "compute", "peers", "samples/s", "efficiency", "epoch s", "microbatches s", "matchmaking s",
              "exchange s", "rest s", "CPU s per peer", "failed rounds"]  # fmt: skip
    return table(header, rows)


def _run(peers: list[Program], setting: Setting, epochs: int) -> dict[str, float]:
    """Means over peers and epochs."""
    for peer in peers:
        peer.ask(**asdict(setting), epochs=epochs)
    answers = [peer.answer(MEET_S + 4 * (epochs + 1) * (setting.epoch_s + 10)) for peer in peers]
    wall_s = statistics.fmean(answer["wall_s"] for answer in answers)
    # All members of a round tell the same number of samples; peers that missed one would tell fewer.
    samples = statistics.fmean(answer["samples"] for answer in answers)
    mean = {
        name: statistics.fmean(answer[name] for answer in answers) / epochs
        for name in ("compute_s", "matchmaking_s", "exchange_s", "cpu_s")
    }
    result = mean | {
        "samples_per_s": samples / wall_s,
        "epoch_s": wall_s / epochs,
        "failed": sum(answer["failed"] for answer in answers),
    }
    print(f"{setting}: {result}", file=sys.stderr)
    return result


def _row(setting: Setting, run: dict[str, float], alone: float) -> list[str]:
    spent_s = run["compute_s"] + (0 if setting.overlap else run["matchmaking_s"] + run["exchange_s"])
    return [
        "alone" if setting.num_peers == 1 else "overlapped" if setting.overlap else "exact",
        f"{setting.epoch_s:g} s",
        str(setting.num_peers),
        f"{run['samples_per_s']:.1f}",
        f"{run['samples_per_s'] / (setting.num_peers * alone):.3f}",
        f"{run['epoch_s']:.2f}",
        f"{run['compute_s']:.2f}",
        f"{run['matchmaking_s']:.2f}",
        f"{run['exchange_s']:.2f}",
        f"{run['epoch_s'] - spent_s:.2f}",
        f"{run['cpu_s']:.2f}",
        f"{run['failed']:.0f}",
    ]


def work(connection: Connection, rank: int, num_params: int, addresses: list[str]) -> None:
    """A peer: fits once for each question and answers with totals over the epochs that count."""
    import logging

    import torch

    torch.set_num_threads(1)
    for name in ("lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for asked in questions(connection):
        epochs = asked.pop("epochs")
        connection.send(_fit(Setting(**asked), epochs, num_params, addresses))


def _fit(setting: Setting, epochs: int, num_params: int, addresses: list[str]) -> dict[str, float]:
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
    from torch.utils.data import DataLoader, TensorDataset

    from hivetrain.strategies import HivemindStrategy

    class Device(LightningModule):
        """Params in a row of square layers, each looking at the input for itself, and a gradient that takes a while."""

        def __init__(self) -> None:
            super().__init__()
            layers = max(1, num_params // WIDTH**2)
            width = WIDTH if num_params >= WIDTH**2 else int(num_params**0.5)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
            self.width, self.compute_s, self.hurries = width, 0.0, True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self._start = time.monotonic()
            inputs = batch[0][:, : self.width]
            return torch.stack([layer(inputs).square().mean() for layer in self.layers]).mean()

        def on_after_backward(self) -> None:
            self.hurries = self.hurries and self.compute_s * WARM_UP_SPEED < WARM_UP_SHARE * setting.epoch_s
            takes_s = MICROBATCH_S / WARM_UP_SPEED if self.hurries else MICROBATCH_S
            time.sleep(max(0.0, self._start + takes_s - time.monotonic()))
            self.compute_s += time.monotonic() - self._start

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Clock(Callback):
        """Notes the totals at the end of the first epoch and at the end of the last."""

        def __init__(self) -> None:
            self.notes: list[dict[str, float]] = []

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            deadline = time.monotonic() + MEET_S
            while not module.compute_s and strategy.num_peers < setting.num_peers:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"only {strategy.num_peers} of {setting.num_peers} peers within {MEET_S:g} s")
                time.sleep(0.02)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            epoch = strategy.swarm_epoch
            if epoch >= (1, 1 + epochs)[len(self.notes)]:
                self.notes.append(self._note(module, epoch))
            trainer.should_stop = len(self.notes) == 2

        def _note(self, module: Any, epoch: int) -> dict[str, float]:
            rounds = strategy.rounds
            return {
                "epoch": epoch,
                "wall_s": time.monotonic(),
                "compute_s": module.compute_s,
                "cpu_s": sum(cpu_seconds().values()),
                "samples": sum(report.samples for report in rounds),
                "matchmaking_s": sum(report.matchmaking_s for report in rounds),
                "exchange_s": sum(report.exchange_s for report in rounds),
                "failed": sum(not report.committed for report in rounds),
            }

    seed_everything(0, verbose=False)
    strategy = HivemindStrategy(
        setting.target,
        run_id=setting.run_id,
        initial_peers=addresses,
        batch_size=MICROBATCH,
        overlap=setting.overlap,
    )
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=-1, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Device(), DataLoader(TensorDataset(torch.randn(64 * MICROBATCH, WIDTH)), batch_size=MICROBATCH))
    first, last = clock.notes
    return {name: last[name] - first[name] for name in last}
