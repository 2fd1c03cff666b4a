"""What Lightning, the strategy and the exchange cost: tokens/s of one model in four settings, from one command.

    python benchmarks/overhead.py [--repeats N] [--seconds S]

All programs start once and then take turns, since a shared machine's speed drifts by more than what is measured: each
makes the global updates of about ``--seconds`` and waits while the others do. Ratios are medians of those of each turn.
"""

import argparse
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

ROWS = {
    "plain": "plain PyTorch loop",
    "lightning": "Lightning miner, no swarm",
    "alone": "miner in a swarm of one",
    "pair": "two miners together",
}
BLOCK_SIZE, BATCH_SIZE = 128, 8
MODEL = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_positions": BLOCK_SIZE}
CLIP_NORM = 1.0
ANSWER_S, TURNS_S = 240.0, 200.0


@dataclass(frozen=True)
class Turn:
    """What one program did between two halts; moments are of the machine's monotonic clock."""

    started_s: float
    ended_s: float
    cpu_s: float
    samples: int
    waited_s: float = 0.0  # for other miners: matchmaking and exchange
    failed_rounds: int = 0

    @classmethod
    def of(cls, turns: Sequence["Turn"]) -> "Turn":
        """The turns of programs that worked at the same time, as one; the wait is their mean."""
        return cls(
            min(turn.started_s for turn in turns),
            max(turn.ended_s for turn in turns),
            sum(turn.cpu_s for turn in turns),
            sum(turn.samples for turn in turns),
            statistics.fmean(turn.waited_s for turn in turns),
            sum(turn.failed_rounds for turn in turns),
        )

    @property
    def wall_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def tokens_per_s(self) -> float:
        return self.samples * BLOCK_SIZE / self.wall_s

    @property
    def cpu_us_per_token(self) -> float:
        """Processor time of the program and all it started."""
        return 1e6 * self.cpu_s / (self.samples * BLOCK_SIZE)


@dataclass
class Worker:
    """A program that trains until told to halt, seen from the benchmark."""

    process: Any
    connection: Connection
    goal: int = 0

    def receive(self) -> Any:
        if not self.connection.poll(ANSWER_S):
            raise TimeoutError(f"{self.process.name} did not answer within {ANSWER_S:.0f} s")
        return self.connection.recv()  # EOFError: it has died, and its own message is on stderr


def main() -> None:
    parser = argparse.ArgumentParser(description="tokens/s of one model in four settings")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn, about")
    parser.add_argument("--target-batch-size", type=int, default=128, help="samples in a global update")
    options = parser.parse_args()
    target = options.target_batch_size
    if options.repeats < 1 or options.seconds <= 0 or target < BATCH_SIZE or target % BATCH_SIZE:
        parser.error(f"give positive numbers, and a --target-batch-size that is a multiple of {BATCH_SIZE}")
    os.environ["OMP_NUM_THREADS"] = "1"
    with start_workers(target) as rows:
        turns = measure(rows, options.repeats, options.seconds)
    print(report(turns, target))


@contextmanager
def start_workers(target_batch_size: int) -> Iterator[dict[str, list[Worker]]]:
    """Programs by row, each ready for its first turn; ended on exit."""
    workers: list[Worker] = []

    def start(row: str, slot: int = 0, initial_peers: Sequence[str] = ()) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        settings = (row, slot, list(initial_peers), target_batch_size, theirs)
        process = multiprocessing.get_context("spawn").Process(target=work, args=settings, name=f"{row}-{slot}")
        process.start()
        theirs.close()
        workers.append(Worker(process, ours))
        return workers[-1]

    try:
        rows = {row: [start(row)] for row in ROWS}
        addresses = {row: single.receive() for row, [single] in rows.items()}
        rows["pair"].append(start("pair", slot=1, initial_peers=addresses["pair"]))
        rows["pair"][1].receive()
        yield rows
    finally:
        for worker in workers:
            worker.connection.close()  # which a halted program takes as its end
        for worker in workers:
            worker.process.join(20)
            if worker.process.is_alive():
                worker.process.kill()


def measure(rows: dict[str, list[Worker]], repeats: int, seconds: float) -> dict[str, list[Turn]]:
    """Turns by row, without the warm-up; fewer than ``repeats`` if the machine is so busy that time runs out."""
    deadline = time.monotonic() + TURNS_S
    for workers in rows.values():
        take_turn(workers, updates=1)
    updates = max(1, round(seconds / take_turn(rows["plain"], updates=1).wall_s))
    turns: dict[str, list[Turn]] = {row: [] for row in rows}
    for repeat in range(repeats):
        for row, workers in rows.items():
            turns[row].append(take_turn(workers, updates))
        speeds = "  ".join(f"{row} {turns[row][-1].tokens_per_s:,.0f}" for row in rows)
        print(f"turn {repeat + 1}/{repeats}, {updates} updates each, tokens/s: {speeds}", file=sys.stderr)
        if time.monotonic() > deadline:
            return turns
    return turns


def take_turn(workers: list[Worker], updates: int) -> Turn:
    for worker in workers:
        worker.goal += updates
        worker.connection.send(worker.goal)
    return Turn.of([worker.receive() for worker in workers])


def report(turns: dict[str, list[Turn]], target_batch_size: int) -> str:
    """The table, and what is needed to read it."""
    lines = ["| | tokens/s, median (min - max) | ratio | CPU us/token | ratio |", "|---|---:|---:|---:|---:|"]
    for row, name in ROWS.items():
        speeds = [turn.tokens_per_s for turn in turns[row]]
        costs = [turn.cpu_us_per_token for turn in turns[row]]
        pairs = list(zip(turns[row], turns["plain"], strict=True))
        faster = statistics.median(turn.tokens_per_s / plain.tokens_per_s for turn, plain in pairs)
        dearer = statistics.median(turn.cpu_us_per_token / plain.cpu_us_per_token for turn, plain in pairs)
        speed = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} - {max(speeds):,.0f})"
        lines.append(f"| {name} | {speed} | {faster:.3f} | {statistics.median(costs):.1f} | {dearer:.3f} |")
    waits = statistics.median(turn.waited_s / turn.wall_s for turn in turns["pair"])
    failed = sum(turn.failed_rounds for turn in turns["pair"] + turns["alone"])
    lines += [
        "",
        f"GPT-2, {MODEL['n_layer']} layers of width {MODEL['n_embd']}; block {BLOCK_SIZE}, microbatch {BATCH_SIZE}, "
        f"{target_batch_size} samples in an update; one thread in each process; {len(turns['plain'])} turns.",
        f"The two miners spent {waits:.0%} of their time in matchmaking and exchange; {failed} rounds failed.",
        machine_facts(),
    ]
    return "\n".join(lines)


def machine_facts() -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "hivemind"))
    return (
        f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}; {versions}, "
        f"Python {platform.python_version()}; load {os.getloadavg()[0]:.1f} at the end."
    )


class Gate:
    """Lets a training program pass until its goal, then hands over a Turn and waits for the next goal."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._goal = 0
        self._start: dict[str, float] = {}

    def is_open(self, updates: int, samples: int, rounds: Sequence[Any] = ()) -> bool:
        """Whether to train on; call it after each microbatch with totals since the start."""
        if updates < self._goal:
            return True
        totals = {
            "samples": samples,
            "waited_s": sum(past.matchmaking_s + past.exchange_s for past in rounds),
            "failed_rounds": sum(not past.committed for past in rounds),
        }
        if self._goal:
            now = {**totals, "cpu_s": _cpu_s()}
            spent: dict[str, Any] = {name: now[name] - self._start[name] for name in now}
            self._connection.send(Turn(self._start["at_s"], time.monotonic(), **spent))
        try:
            self._goal = self._connection.recv()
        except EOFError:
            return False
        self._start = {**totals, "cpu_s": _cpu_s(), "at_s": time.monotonic()}
        return True


def work(row: str, slot: int, initial_peers: list[str], target_batch_size: int, connection: Connection) -> None:
    """The program of one row: trains from turn to turn."""
    import torch
    from lightning.pytorch import seed_everything

    from hivetrain.data import RefinedWebDataModule
    from hivetrain.model import CausalLM

    for name in ("lightning", "lightning.pytorch", "hivetrain"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    data = RefinedWebDataModule(block_size=BLOCK_SIZE, batch_size=BATCH_SIZE, slot=slot)
    model = CausalLM(config=MODEL, vocab_size=data.vocabulary_size)
    if row == "plain":
        train_plainly(model, data, target_batch_size // BATCH_SIZE, connection)
    else:
        train_with_lightning(model, data, row, initial_peers, target_batch_size, connection)


def train_plainly(model: Any, data: Any, microbatches: int, connection: Connection) -> None:
    """The same computation without any of Lightning's loop."""
    from torch.nn.utils import clip_grad_norm_

    configured, params = model.configure_optimizers(), list(model.parameters())
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    data.setup("fit")
    connection.send([])
    is_open = (gate := Gate(connection)).is_open(0, 0)
    for done, batch in enumerate(data.train_dataloader(), start=1):
        if not is_open:
            return
        (model.loss(batch) / microbatches).backward()
        if done % microbatches == 0:
            clip_grad_norm_(params, CLIP_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        is_open = gate.is_open(done // microbatches, done * BATCH_SIZE)


def train_with_lightning(
    model: Any, data: Any, row: str, initial_peers: list[str], target_batch_size: int, connection: Connection
) -> None:
    from lightning.pytorch import Callback, Trainer

    from hivetrain.callbacks import SwarmProgress
    from hivetrain.strategies import HivemindStrategy

    in_swarm = row != "lightning"
    swarm = HivemindStrategy(target_batch_size, run_id=f"overhead-{row}", initial_peers=initial_peers)
    gate = Gate(connection)

    class Halts(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            connection.send(swarm.visible_maddrs)
            trainer.should_stop = not gate.is_open(0, 0)

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if in_swarm:
                is_open = gate.is_open(swarm.swarm_epoch, swarm.samples_contributed, swarm.rounds)
            else:
                is_open = gate.is_open(trainer.global_step, trainer.global_step * target_batch_size)
            trainer.should_stop = not is_open

    trainer = Trainer(
        accelerator="cpu", strategy=swarm if in_swarm else "auto", max_epochs=-1, gradient_clip_val=CLIP_NORM,
        accumulate_grad_batches=1 if in_swarm else target_batch_size // BATCH_SIZE,  # the swarm accumulates by itself
        callbacks=[SwarmProgress(), Halts()], logger=False, enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)


def _cpu_s() -> float:
    """Processor seconds of this process and its descendants, all threads."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(spent.user + spent.system for spent in times)


if __name__ == "__main__":
    main()
