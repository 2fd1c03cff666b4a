"""What a sketch costs beside the forward and backward of its microbatch, at the size of a toy and of GPT-2 124M.

    python benchmarks/sketch.py [--repeats N] [--device cuda] [--precision bf16]
    python benchmarks/sketch.py --layers N --width N --batch N --block N [...]

One process computes a microbatch, then its sketch, again and again, since a shared machine's speed drifts by more than
what is measured; the share is the median of those of each pair. Drawing the signs comes once in a swarm_epoch, not once
in a microbatch, and has a column of its own.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hivetrain.contribution.sketch import Sketcher, sketch_seed
from hivetrain.model import CausalLM

DEADLINE_S = 300.0


@dataclass(frozen=True)
class Size:
    """A model and a microbatch."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    block: int


SIZES = (
    Size("toy", layers=4, width=256, heads=4, vocabulary=4096, batch=8, block=128),
    Size("GPT-2", layers=12, width=768, heads=12, vocabulary=50257, batch=8, block=512),
)


@dataclass(frozen=True)
class Costs:
    """Seconds, one number for each repeat, and the number of params."""

    params: int
    draw_s: float
    work_s: Sequence[float]
    sketch_s: Sequence[float]


def main() -> None:
    parser = argparse.ArgumentParser(description="what a sketch costs beside its forward and backward")
    parser.add_argument("--repeats", type=int, default=7, help="microbatches of each size, after one to warm up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    for name, meaning in (
        ("layers", "layers"),
        ("width", "a multiple of 64"),
        ("batch", "blocks"),
        ("block", "tokens"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"measure a model of one's own instead: {meaning}")
    options = parser.parse_args()
    own = (options.layers, options.width, options.batch, options.block)
    if options.repeats < 1 or any(number is not None and number < 1 for number in own):
        parser.error("give positive numbers")
    if any(own) and not all(own):
        parser.error("give --layers, --width, --batch and --block together")
    if options.width and options.width % 64:
        parser.error("--width must be a multiple of 64")
    sizes = SIZES
    if all(own):
        layers, width, batch, block = own
        sizes = (Size("own", layers, width, width // 64, 4096, batch, block),)
    measured = {size: measure(size, options.repeats, options.device, options.precision) for size in sizes}
    print(report(measured, options.device, options.precision))


def measure(size: Size, repeats: int, device: str, precision: str) -> Costs:
    """Alternating costs of one size, without the warm-up; fewer than ``repeats`` if time runs out."""
    torch.manual_seed(0)
    config = {"n_layer": size.layers, "n_embd": size.width, "n_head": size.heads, "n_positions": size.block}
    model: Any = CausalLM(config=config, vocab_size=size.vocabulary).to(device)
    params = list(model.parameters())
    batch = {"input_ids": torch.randint(size.vocabulary, (size.batch, size.block), device=device)}
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def work() -> None:
        for param in params:
            param.grad = None
        with autocast:
            loss = model.loss(batch)
        loss.backward()

    sizes = [param.numel() for param in params]
    began = time.monotonic()
    sketcher = Sketcher(sketch_seed("benchmark", 0, "0" * 64), sizes, device)
    draw_s = time.monotonic() - began
    work_s, sketch_s = [], []
    for _ in range(repeats + 1):
        work_s.append(seconds(work, device))
        sketch_s.append(seconds(lambda: sketcher.sketch([param.grad for param in params]), device))
        if len(work_s) > 1 and time.monotonic() - began > DEADLINE_S:
            break
    return Costs(sum(sizes), draw_s, work_s[1:], sketch_s[1:])


def seconds(call: Callable[[], Any], device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def report(measured: dict[Size, Costs], device: str, precision: str) -> str:
    """The table, and what is needed to read it."""
    lines = [
        "| | params | microbatch | forward + backward, ms | sketch, ms | share (min - max) | drawing signs, ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for size, costs in measured.items():
        shares = [sketch / work for sketch, work in zip(costs.sketch_s, costs.work_s, strict=True)]
        lines.append(
            f"| {size.name} | {costs.params / 1e6:.1f} M | {size.batch} x {size.block} "
            f"| {1e3 * statistics.median(costs.work_s):,.1f} | {1e3 * statistics.median(costs.sketch_s):.2f} "
            f"| {statistics.median(shares):.2%} ({min(shares):.2%} - {max(shares):.2%}) | {1e3 * costs.draw_s:.1f} |"
        )
    repeats = ", ".join(str(len(costs.work_s)) for costs in measured.values())
    lines += [
        "",
        f"{precision} on {device}, {torch.get_num_threads()} threads; {repeats} repeats.",
        machine_facts(device),
    ]
    return "\n".join(lines)


def machine_facts(device: str) -> str:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else ""
    return (
        f"{os.cpu_count()} cores, {names[0] if names else platform.machine()}{gpu}; torch {version('torch')}, "
        f"Python {platform.python_version()}; load {os.getloadavg()[0]:.1f} at the end."
    )


if __name__ == "__main__":
    main()
