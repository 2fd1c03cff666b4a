"""Runs the demo: starts the programs, shows their progress, waits for their end, writes the summary.

Everything happens through the programs' public face: command lines, the bootstrap's address file, the miners' reports.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hivetrain.demo.fleet import Fleet
from hivetrain.demo.reports import MinerLog, loss_at, summarize
from hivetrain.errors import UserError

_POLL_S = 0.5
_BOOTSTRAP_S = 90.0
MINER_CONFIG = Path(__file__).with_name("miner.yaml")


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    Attributes:
        miners: number of miners.
        swarm_epochs: global updates to make.
        out: directory for summary, plot, reports and logs.
        seed: seed of model and data assignment.
        timeout_s: the demo is given up after this many seconds.
    """

    miners: int = 2
    swarm_epochs: int = 60
    out: Path = Path("out")
    seed: int = 0
    timeout_s: float = 900.0


def run_demo(options: Options, console: Console) -> int:
    """Runs the demo and returns the exit status: 0 if every miner that lived to the end holds the same params."""
    if options.miners < 1 or options.swarm_epochs < 1:
        raise UserError("--miners and --swarm-epochs must be at least 1")
    started = time.monotonic()
    names = [f"miner-{index}" for index in range(options.miners)]
    logs = [MinerLog(options.out / f"{name}.jsonl") for name in names]
    for log in logs:
        log.path.unlink(missing_ok=True)  # of an earlier run
    with _sigterm_raises(), Fleet(options.out / "logs") as fleet:
        url = _start_bootstrap(fleet, options.out / "bootstrap.json")
        console.print(f"bootstrap server at {url}; logs in {options.out / 'logs'}")
        for slot, name in enumerate(names):
            fleet.start(name, _miner_arguments(options, name, slot, url))
        console.print(f"{options.miners} miners are starting: " + ", ".join(f"pid {fleet.pid(n)}" for n in names))
        _follow(fleet, names, logs, options, started, console)
        exit_codes = [fleet.exit_code(name) for name in names]
        for name, code in zip(names, exit_codes, strict=True):
            if code != 0:
                console.print(f"{name} did not finish (exit code {code}):\n{fleet.log_tail(name)}")
    summary = summarize(logs, exit_codes, time.monotonic() - started)
    _write(options.out / "summary.json", summary)
    plotted = _plot(logs, summary, options.out / "loss.png")
    _print_summary(summary, options.out, plotted, console)
    return 0 if summary["digests_equal"] and summary["swarm_epochs"] >= options.swarm_epochs else 1


def _start_bootstrap(fleet: Fleet, address_file: Path) -> str:
    address_file.unlink(missing_ok=True)
    identity = address_file.with_suffix(".id")
    fleet.start(
        "bootstrap", ["bootstrap", "--port", "0", "--address-file", str(address_file), "--identity-path", str(identity)]
    )
    deadline = time.monotonic() + _BOOTSTRAP_S
    while not address_file.exists():
        if fleet.exit_code("bootstrap") is not None or time.monotonic() > deadline:
            raise UserError(f"the bootstrap server did not start:\n{fleet.log_tail('bootstrap')}")
        time.sleep(0.1)
    return str(json.loads(address_file.read_text())["url"])


def _miner_arguments(options: Options, name: str, slot: int, url: str) -> list[str]:
    settings = {
        "seed_everything": options.seed,
        "trainer.strategy.run_id": f"demo-{os.getpid()}",
        "trainer.strategy.initial_peers": url,
        "data.seed": options.seed,
        "data.slot": slot,
        "stop.epochs": options.swarm_epochs,
        "report": "hivetrain.callbacks.MinerReport",
        "report.path": options.out / f"{name}.jsonl",
    }
    return ["fit", "--config", str(MINER_CONFIG), *(f"--{key}={value}" for key, value in settings.items())]


def _follow(
    fleet: Fleet, names: list[str], logs: list[MinerLog], options: Options, started: float, console: Console
) -> None:
    """Shows progress until all miners have ended, or time is up."""
    shown = -1
    with Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else _nothing() as live:
        while any(fleet.exit_code(name) is None for name in names):
            if time.monotonic() - started > options.timeout_s:
                console.print(f"time is up after {options.timeout_s:.0f} s; stopping what still runs")
                return
            time.sleep(_POLL_S)
            for log in logs:
                log.read()
            last = max((epoch for log in logs for epoch in log.epochs), default=-1)
            if live is not None:
                live.update(_table(fleet, names, logs, options))
            elif last > shown:
                console.print(_line(logs, last, options))
            shown = max(shown, last)
    for log in logs:
        log.read()


def _line(logs: list[MinerLog], epoch: int, options: Options) -> str:
    records = [log.epochs[epoch] for log in logs if epoch in log.epochs]
    loss = loss_at(logs, epoch)
    return (
        f"swarm epoch {epoch + 1}/{options.swarm_epochs}  loss {'-' if loss is None else f'{loss:.3f}'}  "
        f"peers {max(r['peers'] or 0 for r in records)}  group {max(r['group_size'] or 0 for r in records)}  "
        f"{records[0]['outcome']}  exchange {max(r['exchange_s'] or 0 for r in records):.2f} s"
    )


def _table(fleet: Fleet, names: list[str], logs: list[MinerLog], options: Options) -> Table:
    columns = ("miner", "pid", "swarm epoch", "loss", "tokens", "tokens/s", "peers", "last exchange")
    table = Table(*columns, title="hivetrain demo")
    for name, log in zip(names, logs, strict=True):
        last = log.epochs[max(log.epochs)] if log.epochs else None
        code = fleet.exit_code(name)
        state = str(fleet.pid(name)) if code is None else f"ended ({code})"
        if last is None:
            table.add_row(name, state, "starting", *[""] * 5)
            continue
        loss = "-" if last["loss"] is None else f"{last['loss']:.3f}"
        table.add_row(
            name, state, f"{last['swarm_epoch'] + 1}/{options.swarm_epochs}", loss, f"{log.tokens:,}",
            f"{log.tokens / max(last['wall_s'], 1e-9):,.0f}", str(last["peers"]), f"{last['exchange_s'] or 0:.2f} s",
        )  # fmt: skip
    return table


def _print_summary(summary: dict[str, Any], out: Path, plotted: bool, console: Console) -> None:
    table = Table("miner", "swarm epoch", "samples", "params digest")
    for miner in summary["miners"]:
        digest = miner["params_digest"][:16] if miner["params_digest"] else f"ended with {miner['exit_code']}"
        table.add_row(str(miner["peer_id"])[-8:], str(miner["swarm_epoch"]), f"{miner['samples']:,}", digest)
    console.print(table)
    first, last = summary["heldout_loss_first"], summary["heldout_loss_last"]
    if first is not None and last is not None:
        console.print(f"held-out loss {first:.3f} -> {last:.3f} nats in {summary['wall_s']:.0f} s")
    same = "the same" if summary["digests_equal"] else "NOT the same"
    console.print(f"miners that reached the end hold {same} params; {out / 'summary.json'}")
    console.print(f"loss plot: {out / 'loss.png'}" if plotted else "no loss plot: pip install 'hivetrain[plot]'")


def _plot(logs: list[MinerLog], summary: dict[str, Any], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for index, log in enumerate(logs):
        points = [(epoch + 1, r["loss"]) for epoch, r in sorted(log.epochs.items()) if r["loss"] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"miner {index}, training")
    held_out = [summary["heldout_loss_first"], summary["heldout_loss_last"]]
    if None not in held_out:
        axes.plot([0, summary["swarm_epochs"]], held_out, "k--o", label="held out, first and last")
    axes.set(xlabel="swarm epoch", ylabel="loss (nats per token)", title="one model, trained together")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that the fleet is stopped."""

    def end(_signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
