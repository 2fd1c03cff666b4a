"""How far apart honest and dishonest microbatches are, measured by the relative error of their sketches.

    nice python benchmarks/tolerance.py [--plot docs/images/tolerance.png]

A small GPT learns from the embedded corpus. Before updates 0, 20, 100 and 300 some microbatches of another slot are
computed as honest miners would, in other precisions and with other thread counts, and as dishonest ones would. Prints
the errors, how far they stay from the tolerance, and what the exchange's encodings do to the sum of sketches.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hivetrain.averaging.codecs import CODECS, Codec
from hivetrain.contribution.audit import SUM_TOLERANCES, TOLERANCES, relative_error
from hivetrain.contribution.replay import REPLAYED_IN, Replayer
from hivetrain.contribution.sketch import Sketcher, sketch_seed
from hivetrain.data import RefinedWebDataModule, SlotReader
from hivetrain.model import CausalLM

POINTS = (0, 20, 100, 300)
BATCH_SIZE, BLOCK_SIZE, LAYERS, WIDTH = 8, 128, 4, 256
MINER_SLOT, AUDITED_SLOT, OTHER_SLOT = 0, 1, 2
START = (0, 0, 0, 0)
SWAPPED = "one of 8 sequences swapped"
FP16_SCALE = 2.0**14
MARGIN = 5.0

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Work:
    """One microbatch as somebody computed it."""

    precision: str
    loss: float
    sketch: torch.Tensor
    flat: torch.Tensor


@dataclass(frozen=True)
class Claim:
    """What somebody says about a microbatch, and the replay that it is compared with."""

    name: str
    honest: bool
    claimed: Work
    replay: Work

    @property
    def alike(self) -> bool:
        """Whether the replay is in the miner's own precision, as the one that decides always is."""
        return REPLAYED_IN[self.claimed.precision] == self.replay.precision


@dataclass
class Row:
    """One comparison: the errors of all microbatches at each point."""

    name: str
    honest: bool
    alike: bool
    errors: dict[int, list[float]] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)

    def worst(self, point: int) -> float:
        """The error that is nearest to the tolerance, or beyond it."""
        return max(self.errors[point]) if self.honest else min(self.errors[point])


class Bench:
    """The model in training, and replayers of all kinds beside it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.data = RefinedWebDataModule(block_size=BLOCK_SIZE, batch_size=BATCH_SIZE, slot=MINER_SLOT)
        config = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": WIDTH // 64, "n_positions": BLOCK_SIZE}
        self.model = CausalLM(
            config=config, vocab_size=self.data.vocabulary_size, learning_rate=1e-3, warmup_epochs=10, total_epochs=400
        )
        configured = self.model.configure_optimizers()
        self.optimizer, self.schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        self.params = [param for group in self.optimizer.param_groups for param in group["params"]]
        self.reader = SlotReader.of(self.data)
        self.replayer, self.older = (Replayer(self.model, self.params, self.reader) for _ in range(2))
        self.in_parts = Replayer(self.model, self.params, self.reader, rows=2)
        self.before: dict[str, torch.Tensor] = {}
        self.stream = iter(self.data.train_dataloader())

    def train_until(self, update: int, done: int) -> None:
        """Makes updates ``done`` to ``update`` and remembers the params before the last one."""
        for _ in range(done, update):
            self.before = self.state()
            self.model.loss(next(self.stream)).backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        return {name: param.detach().clone() for name, param in self.model.named_parameters()}

    def open(self, point: int) -> None:
        """Puts the current params into all replayers and draws the point's signs."""
        state = self.state()
        self.replayer.load(state)
        self.in_parts.load(state)
        self.older.load(self.before or state)
        self.sketcher = Sketcher(sketch_seed("tolerance", point, "0" * 64), [p.numel() for p in self.params])

    def work(
        self, batch: Batch, precision: str = "32-true", threads: int = 1, replayer: Replayer | None = None
    ) -> Work:
        torch.set_num_threads(threads)
        try:
            if precision == "16-mixed":
                loss, gradients = self.in_fp16(batch)
            else:
                loss, gradients = (replayer or self.replayer).gradients(batch, precision)
            sketch = self.sketcher.sketch(gradients)
        finally:
            torch.set_num_threads(1)
        return Work(precision, loss, sketch, torch.cat([gradient.flatten() for gradient in gradients]))

    def in_fp16(self, batch: Batch) -> tuple[float, list[torch.Tensor]]:
        """As a miner with 16-mixed: the loss scaled, the gradient unscaled."""
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = self.model.loss(batch)
        (loss * FP16_SCALE).backward()
        gradients = [param.grad / FP16_SCALE for param in self.params]
        self.model.zero_grad()
        return loss.item(), gradients

    def batch(self, slot: int, number: int) -> Batch:
        return self.reader.batch(slot, START, number * BATCH_SIZE, BATCH_SIZE)[0]


def claims(bench: Bench, number: int, point: int) -> Iterator[Claim]:
    """All that is compared for one microbatch."""
    batch, other = bench.batch(AUDITED_SLOT, number), bench.batch(OTHER_SLOT, number)
    ids, other_ids = batch["input_ids"], other["input_ids"]
    fp32, bf16, fp16 = (bench.work(batch, precision) for precision in ("32-true", "bf16-mixed", "16-mixed"))
    parts = bench.in_parts
    yield Claim("fp32, replayed with 2 threads", True, fp32, bench.work(batch, threads=2))
    yield Claim("fp32, replayed 2 sequences at a time", True, fp32, bench.work(batch, replayer=parts))
    yield Claim("fp16, replayed in fp32", True, fp16, fp32)
    yield Claim("bf16, replayed with 2 threads", True, bf16, bench.work(batch, "bf16-mixed", threads=2))
    yield Claim("bf16, replayed 2 sequences at a time", True, bf16, bench.work(batch, "bf16-mixed", replayer=parts))
    yield Claim("bf16, replayed in fp32", True, bf16, fp32)
    yield Claim("fp32, replayed in bf16", True, fp32, bf16)
    yield Claim("fp16, replayed in bf16", True, fp16, bf16)
    swapped = {"input_ids": torch.cat([ids[:-1], other_ids[-1:]])}
    swapped_fp32, swapped_bf16 = bench.work(swapped), bench.work(swapped, "bf16-mixed")
    yield Claim(f"{SWAPPED}, fp32", False, swapped_fp32, fp32)
    yield Claim(f"{SWAPPED}, bf16", False, swapped_bf16, bf16)
    yield Claim(f"{SWAPPED}, fp32 replayed in bf16", False, swapped_fp32, bf16)
    yield Claim(f"{SWAPPED}, bf16 replayed in fp32", False, swapped_bf16, fp32)
    yield Claim("7 of the 8 sequences", False, bench.work({"input_ids": ids[:-1]}), fp32)
    yield Claim("half of the microbatch", False, bench.work({"input_ids": ids[: BATCH_SIZE // 2]}), fp32)
    if point:
        yield Claim("params one update old", False, bench.work(batch, replayer=bench.older), fp32)
    yield Claim("other data", False, bench.work(other), fp32)


def sum_error(bench: Bench, codec: Codec, members: Sequence[Work], weights: Sequence[float]) -> float:
    """Relative error of the weighted mean of sketches against the sketch of what an exchange would give."""

    def sent(vector: torch.Tensor) -> torch.Tensor:
        return codec.decode(codec.encode(vector), vector.numel())

    shares = [weight / sum(weights) for weight in weights]
    average = torch.stack([share * sent(member.flat) for share, member in zip(shares, members, strict=True)]).sum(0)
    expected = torch.stack([share * member.sketch for share, member in zip(shares, members, strict=True)]).sum(0)
    return relative_error(expected, bench.sketcher.sketch_flat(sent(average)))


def measure(microbatches: int, points: Sequence[int]) -> tuple[list[Row], dict[str, dict[int, float]], list[float]]:
    """All comparisons at all points; the errors of sums by codec and point; the training's losses at the points."""
    bench, losses = Bench(), []
    rows: dict[str, Row] = {}
    sums: dict[str, dict[int, float]] = {name: {} for name in SUM_TOLERANCES}
    for before, point in itertools.pairwise((0, *points)):
        bench.train_until(point, before)
        bench.open(point)
        for claim in itertools.chain(*(claims(bench, number, point) for number in range(microbatches))):
            row = rows.setdefault(claim.name, Row(claim.name, claim.honest, claim.alike))
            row.errors.setdefault(point, []).append(relative_error(claim.claimed.sketch, claim.replay.sketch))
            row.losses.setdefault(point, []).append(
                abs(claim.claimed.loss - claim.replay.loss) / max(claim.replay.loss, 1.0)
            )
        members = [bench.work(bench.batch(slot, 0)) for slot in (AUDITED_SLOT, OTHER_SLOT, MINER_SLOT)]
        losses.append(statistics.fmean(member.loss for member in members))
        for name in sums:
            sums[name][point] = sum_error(bench, CODECS[name], members, (8, 24, 40))
        print(f"update {point}: loss {losses[-1]:.3f}", file=sys.stderr)
    return list(rows.values()), sums, losses


def report(rows: Sequence[Row], sums: dict[str, dict[int, float]], losses: Sequence[float]) -> str:
    points = list(sums["none"])
    header = " | ".join(f"update {point}" for point in points)
    lines = [
        "Relative error of the sketch, the largest of the honest and the smallest of the dishonest microbatches, and"
    ]
    lines += ["the largest error of the loss:", "", f"| | {header} | loss |", "|---|" + "---:|" * (len(points) + 1)]
    for row in rows:
        cells = " | ".join(f"{row.worst(point):.1e}" if point in row.errors else "" for point in points)
        lines.append(f"| {row.name} | {cells} | {max(itertools.chain(*row.losses.values())):.0e} |")
    lines += ["", f"Distance from the tolerance, as a factor ({MARGIN:g} is asked for):", ""]
    lines += [f"| | {header} |", "|---|" + "---:|" * len(points)]
    limit = TOLERANCES["32-true"].sketch
    for kind, alike in (("in the miner's precision", True), ("across fp32 and bf16", False)):
        chosen = [row for row in rows if row.alike is alike]
        honest = [max(row.worst(point) for row in chosen if row.honest) for point in points]
        swapped = [min(row.worst(point) for row in chosen if row.name.startswith(SWAPPED)) for point in points]
        lines.append(f"| {kind}: {limit:g} / worst honest | " + " | ".join(f"{limit / e:.1f}" for e in honest) + " |")
        lines.append(f"| {kind}: {SWAPPED} / {limit:g} | " + " | ".join(f"{e / limit:.1f}" for e in swapped) + " |")
    lines += ["", "Sum of the members' sketches against the sketch of the averaged gradient:", ""]
    lines += [f"| compression | {header} | tolerance |", "|---|" + "---:|" * (len(points) + 1)]
    for name, errors in sums.items():
        cells = " | ".join(f"{errors[point]:.1e}" for point in points)
        lines.append(f"| {name} | {cells} | {SUM_TOLERANCES[name]:g} |")
    lines += ["", "Mean loss at these points: " + ", ".join(f"{loss:.2f}" for loss in losses) + "."]
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=90)
    points = sorted(rows[0].errors)
    for row in rows:
        style = {"color": "tab:green", "marker": "o"} if row.honest else {"color": "tab:red", "marker": "x"}
        drawn = [(points.index(point), error) for point, errors in row.errors.items() for error in errors]
        axes.plot(*zip(*drawn, strict=True), linestyle="none", alpha=0.5, markersize=4, **style)
    axes.axhline(TOLERANCES["32-true"].sketch, color="black", linewidth=1, label="tolerance")
    axes.plot([], [], "o", color="tab:green", label="honest, in other precisions and thread counts")
    axes.plot([], [], "x", color="tab:red", label="dishonest: one of 8 swapped, 7 of 8, half, stale, other data")
    axes.set(yscale="log", xlabel="updates", ylabel="relative error of the sketch", xticks=range(len(points)))
    axes.set_xticklabels([str(point) for point in points])
    axes.legend(fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.42))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=4, help="at each point (default: 4)")
    parser.add_argument("--points", type=int, nargs="+", default=POINTS, help="updates, rising (default: 0 20 100 300)")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, sums, losses = measure(args.microbatches, args.points)
    print(report(rows, sums, losses))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
