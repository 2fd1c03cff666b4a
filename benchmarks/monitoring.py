"""What watching a miner costs, as a share of its step time, from one command.

    python benchmarks/monitoring.py [--pairs N] [--microbatches N]

One miner in a swarm of its own trains; all that watches it (metrics and somebody who asks for them, status records,
energy) is switched on and off in turns of the same process, so that drift of the machine's speed meets both. What it
does on the training thread is also timed directly, which says more where the machine is busy with other things.
"""

import argparse
import logging
import os
import statistics
import threading
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from overhead import BATCH_SIZE, BLOCK_SIZE, MODEL, machine_facts

from hivetrain.callbacks import EnergyUse, SwarmMetrics, SwarmStatus
from hivetrain.data import RefinedWebDataModule
from hivetrain.model import CausalLM
from hivetrain.strategies import HivemindStrategy

SCRAPE_S = 15.0  # for the share; the benchmark itself asks more often
UPDATE = 4  # microbatches in a global update: few, so that what is done once for each counts much


@dataclass(frozen=True)
class Turn:
    """Some microbatches, with the watching on or off."""

    wall_s: float
    cpu_s: float  # of this process
    dht_cpu_s: float  # of those that it started

    @classmethod
    def now(cls) -> "Turn":
        """Clocks as they stand."""
        times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return cls(time.perf_counter(), time.process_time(), sum(spent.user + spent.system for spent in times))

    def since(self, began: "Turn") -> "Turn":
        """What has gone by."""
        return Turn(self.wall_s - began.wall_s, self.cpu_s - began.cpu_s, self.dht_cpu_s - began.dht_cpu_s)


@dataclass
class Watching:
    """What was measured of the watching itself."""

    hooks_s: float = 0.0
    threads_s: float = 0.0  # CPU time
    microbatches: int = 0
    scrapes_s: list[float] = field(default_factory=list)


class Switched(Callback):
    """Starts and ends the watching callbacks in the middle of a fit, and times both kinds of turns.

    Args:
        make: new watching callbacks.
        pairs: turns of each kind.
        microbatches: in a turn.
    """

    def __init__(self, make: Any, pairs: int, microbatches: int) -> None:
        self.turns: dict[bool, list[Turn]] = {True: [], False: []}
        self.watching = Watching()
        self._make, self._pairs, self._microbatches = make, pairs, microbatches
        self._callbacks: list[Callback] = []
        self._scraper: threading.Thread | None = None
        self._ended = threading.Event()
        self._done = 0
        self._began = Turn.now()
        self._others: set[int] = set()

    @property
    def energy_j(self) -> float | None:
        """For the status records, which look for it among Lightning's callbacks."""
        return next((own.energy_j for own in self._callbacks if isinstance(own, EnergyUse)), None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *arguments: Any) -> None:
        if self._done % self._microbatches == 0:
            self._switch(trainer, pl_module)
        self._call("on_train_batch_start", trainer, pl_module, *arguments)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *arguments: Any) -> None:
        self._call("on_train_batch_end", trainer, pl_module, *arguments)
        self._done += 1
        self.watching.microbatches += bool(self._callbacks)
        if self._done % self._microbatches == 0:
            self._close(trainer, pl_module)

    def _is_on(self) -> bool:
        """On, off, off, on, so that neither kind is always the later one."""
        return self._done // self._microbatches % 4 in (0, 3)

    def _switch(self, trainer: Trainer, pl_module: Any) -> None:
        self._others = {thread.id for thread in psutil.Process().threads()}
        if self._is_on():
            self._callbacks = self._make()
            for callback in self._callbacks:
                callback.setup(trainer, pl_module, "fit")
                callback.on_train_start(trainer, pl_module)
            self._ended = threading.Event()
            self._scraper = threading.Thread(target=self._scrape, daemon=True)
            self._scraper.start()
        self._began = Turn.now()

    def _close(self, trainer: Trainer, pl_module: Any) -> None:
        was_on = bool(self._callbacks)
        self.turns[was_on].append(Turn.now().since(self._began))
        if was_on:
            scraper = self._scraper.native_id if self._scraper is not None else None
            started = [thread for thread in psutil.Process().threads() if thread.id not in {*self._others, scraper}]
            self.watching.threads_s += sum(thread.user_time + thread.system_time for thread in started)
        self._ended.set()
        if self._scraper is not None:
            self._scraper.join(10)
            self._scraper = None
        for callback in self._callbacks:
            callback.on_train_end(trainer, pl_module)
            callback.teardown(trainer, pl_module, "fit")
        self._callbacks = []
        trainer.should_stop = all(len(turns) > self._pairs for turns in self.turns.values())  # the first warm up

    def _call(self, hook: str, *arguments: Any) -> None:
        began = time.perf_counter()
        for callback in self._callbacks:
            getattr(callback, hook)(*arguments)
        if self._callbacks:
            self.watching.hooks_s += time.perf_counter() - began

    def _scrape(self) -> None:
        (metrics,) = [callback for callback in self._callbacks if isinstance(callback, SwarmMetrics)]
        url, ended = metrics.url, self._ended
        while url is not None and not ended.wait(1.0):
            began = time.perf_counter()
            with suppress(OSError), urllib.request.urlopen(url, timeout=10) as answer:
                answer.read()
                self.watching.scrapes_s.append(time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of all monitoring as a share of a miner's step time")
    parser.add_argument("--pairs", type=int, default=12, help="turns with, and as many without")
    parser.add_argument("--microbatches", type=int, default=16, help="in a turn")
    options = parser.parse_args()
    if options.pairs < 1 or options.microbatches < UPDATE:
        parser.error(f"give at least one pair and {UPDATE} --microbatches")
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as directory:
        switched = train(Path(directory), options.pairs, options.microbatches)
    print(report(switched, options.microbatches))


def train(directory: Path, pairs: int, microbatches: int) -> Switched:
    """Train until all turns have been taken."""
    for name in ("lightning", "lightning.pytorch", "hivetrain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    lay_out_counters(directory)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    data = RefinedWebDataModule(block_size=BLOCK_SIZE, batch_size=BATCH_SIZE)
    model = CausalLM(config=MODEL, vocab_size=data.vocabulary_size)

    def make() -> list[Callback]:  # each more often than it would be by default
        return [SwarmMetrics(port=0), EnergyUse(every_s=1.0), SwarmStatus(every_s=1.0)]

    switched = Switched(make, pairs, microbatches)
    trainer = Trainer(
        accelerator="cpu", strategy=HivemindStrategy(UPDATE * BATCH_SIZE, run_id="monitoring", initial_peers=[]),
        max_epochs=-1, callbacks=[switched], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return switched


def lay_out_counters(directory: Path) -> None:
    """Give zeus files to read where this machine has no counters."""
    from zeus.device.cpu import rapl

    if rapl.rapl_is_available():
        return
    rapl.rapl_is_available.cache_clear()
    rapl.RAPL_DIR = str(directory)
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0/intel-rapl:0:0", "dram")):
        (directory / zone).mkdir()
        for file, content in (("name", name), ("energy_uj", "1000000"), ("max_energy_range_uj", "262143328850")):
            (directory / zone / file).write_text(f"{content}\n")


def report(switched: Switched, microbatches: int) -> str:
    """The table, and what is needed to read it. The first turn of each kind warms up and is left out."""
    on, off = switched.turns[True][1:], switched.turns[False][1:]
    step_s = statistics.median(turn.wall_s for turn in off) / microbatches
    watching = switched.watching
    dht_s = statistics.fmean(turn.dht_cpu_s for turn in on) - statistics.fmean(turn.dht_cpu_s for turn in off)
    shares = {
        "hooks, on the training thread": watching.hooks_s / watching.microbatches / step_s,
        "threads of the callbacks, CPU time": watching.threads_s / watching.microbatches / step_s,
        "DHT's processes, CPU time with less that without": dht_s / microbatches / step_s,
        f"a request for all metrics every {SCRAPE_S:g} s": statistics.median(watching.scrapes_s) / SCRAPE_S,
    }
    lines = [f"A step without monitoring takes {1e3 * step_s:.0f} ms.", "", "| part | of a step |", "|---|---:|"]
    lines += [f"| {name} | {share:.3%} |" for name, share in shares.items()]
    lines.append(f"| sum | {sum(shares.values()):.3%} |")
    lines += ["", "| turns with over turns without | median | quartiles |", "|---|---:|---:|"]
    for name, key in (("wall time", "wall_s"), ("CPU time of the miner's process", "cpu_s")):
        ratios = [getattr(a, key) / getattr(b, key) - 1 for a, b in zip(on, off, strict=False)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        lines.append(f"| {name} | {middle:+.2%} | {low:+.1%} to {high:+.1%} |")
    lines += [
        "",
        f"GPT-2, {MODEL['n_layer']} layers of width {MODEL['n_embd']}; block {BLOCK_SIZE}, microbatch {BATCH_SIZE}, "
        f"{UPDATE} microbatches in an update; {len(on)} pairs of turns of {microbatches} steps; metrics asked for, "
        f"energy read and a status record published every second; {len(watching.scrapes_s)} requests.",
        machine_facts(),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
