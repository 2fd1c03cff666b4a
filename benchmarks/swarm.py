"""What training in company costs and saves, from one command: efficiency, compression, joining.

    python benchmarks/swarm.py [--parts abc] [--quick]

(a) samples/s of N peers against N times one peer, with the device's compute emulated; (b) bytes and loss for each
compression; (c) time to join, memory, digest. All comparisons are within one run. Parts a and c measure time: run them
on a machine that has nothing else to do. The exchange alone: exchange.py.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

os.environ["OMP_NUM_THREADS"] = "1"

import swarm_compression  # noqa: E402
import swarm_efficiency  # noqa: E402
import swarm_joining  # noqa: E402
from overhead import machine_facts  # noqa: E402

TITLES = {
    "a": "Efficiency with emulated compute",
    "b": "Compression",
    "c": "Joining, memory, digest",
}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    epoch_seconds: tuple[float, ...] = (10.0, 30.0)
    groups: tuple[int, ...] = (2, 3, 4)
    num_params: int = 10_000_000
    epochs: int = 3
    compressions: tuple[str, ...] = ("none", "fp16", "int8", "powersgd(8)", "powersgd(16)")
    task: swarm_compression.Task = swarm_compression.Task(updates=300)
    joins: int = 3
    digest_layers: int = 9
    digest_width: int = 768


QUICK = Plan(
    epoch_seconds=(1.0,),
    groups=(2,),
    num_params=10_000,
    epochs=1,
    compressions=("none", "powersgd(2)"),
    task=swarm_compression.Task(updates=2, batch_size=2, block_size=32, layers=1, width=64, val_blocks=2),
    joins=1,
    digest_layers=1,
    digest_width=64,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="what training in company costs and saves")
    parser.add_argument("--parts", default="abc", help="which parts to run, in the order given; default abc")
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    parser.add_argument("--epoch-seconds", help="part a: emulated compute in an epoch, for example 10,30")
    parser.add_argument("--peers", help="part a: sizes of the swarm, for example 2,3,4")
    parser.add_argument("--epochs", type=int, help="part a: epochs that count; one more comes before")
    parser.add_argument("--updates", type=int, help="part b: global updates")
    options = parser.parse_args()
    if not options.parts or set(options.parts) - set(TITLES):
        parser.error(f"--parts takes letters of {''.join(TITLES)}")
    plan = QUICK if options.quick else Plan()
    if options.epoch_seconds:
        plan = replace(plan, epoch_seconds=tuple(float(text) for text in options.epoch_seconds.split(",")))
    if options.peers:
        plan = replace(plan, groups=tuple(int(text) for text in options.peers.split(",")))
    plan = replace(plan, epochs=options.epochs or plan.epochs)
    plan = replace(plan, task=replace(plan.task, updates=options.updates or plan.task.updates))
    for part in options.parts:
        start = time.monotonic()
        print(f"### {TITLES[part]}\n\n{PARTS[part](plan)}\n", flush=True)
        print(f"part {part} took {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(machine_facts())


PARTS: dict[str, Callable[[Plan], str]] = {
    "a": lambda plan: swarm_efficiency.measure(plan.epoch_seconds, plan.groups, plan.num_params, plan.epochs),
    "b": lambda plan: swarm_compression.measure(plan.compressions, plan.task),
    "c": lambda plan: swarm_joining.measure(plan.num_params, plan.joins, plan.digest_layers, plan.digest_width),
}


if __name__ == "__main__":
    main()
