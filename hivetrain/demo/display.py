"""What the demo shows: a line per swarm epoch, a live table, the tables at the end, and the plot."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hivetrain.demo.fleet import Fleet
from hivetrain.demo.options import Options
from hivetrain.demo.reports import MinerLog, loss_at


def line(logs: list[MinerLog], epoch: int, options: Options) -> str:
    """One swarm epoch, over all miners."""
    records = [log.epochs[epoch] for log in logs if epoch in log.epochs]
    honest = [log for log, name in zip(logs, options.miner_names, strict=True) if not options.cheat_of(name)]
    loss = loss_at(honest, epoch)
    return (
        f"swarm epoch {epoch + 1}/{options.swarm_epochs}  loss {'-' if loss is None else f'{loss:.3f}'}  "
        f"peers {max(r['peers'] or 0 for r in records)}  group {max(r['group_size'] or 0 for r in records)}  "
        f"{records[0]['outcome']}  exchange {max(r['exchange_s'] or 0 for r in records):.2f} s"
    )


def table(fleet: Fleet, names: list[str], logs: list[MinerLog], options: Options) -> Table:
    """The miners as they are now."""
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


def print_summary(summary: dict[str, Any], out: Path, plotted: bool, console: Console) -> None:
    """The tables at the end."""
    _print_pay(summary, console)
    first, last = summary["heldout_loss_first"], summary["heldout_loss_last"]
    if first is not None and last is not None:
        console.print(f"held-out loss {first:.3f} -> {last:.3f} nats in {summary['wall_s']:.0f} s")
    same = "the same" if summary["digests_equal"] else "NOT the same"
    console.print(f"miners that reached the end hold {same} params; {out / 'summary.json'}")
    console.print(f"loss plot: {out / 'loss.png'}" if plotted else "no loss plot: pip install 'hivetrain[plot]'")


def _print_pay(summary: dict[str, Any], console: Console) -> None:
    weights = [f"weight {index}" for index in range(len(summary["validators"]))]
    columns = ("miner", "samples", "verified", "audits", *weights, "incentive", "emission")
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for miner in summary["miners"]:
        hotkey, audits = miner["hotkey"], miner["audits"]
        table.add_row(
            miner["name"] + (" *" if miner["cheat"] else ""),
            f"{miner['samples']:,}",
            f"{miner['verified']:,}",
            "/".join(str(audits[verdict]) for verdict in ("passed", "failed", "missing")),
            *(f"{weight:.3f}" for weight in miner["weights"]),
            f"{summary['incentive'][hotkey]:.3f}",
            f"{summary['emission'][hotkey]:.2f}",
        )
    console.print(table)
    console.print("audits: passed/failed/missing. " + "".join(
        f"* {miner['name']} cheats ({miner['cheat']}). " for miner in summary["miners"] if miner["cheat"]
    ))  # fmt: skip
    for miner in summary["miners"]:
        if miner["params_digest"] is None:
            console.print(f"{miner['name']} ended early, with exit code {miner['exit_code']}")
    if summary["validators"]:
        console.print(f"the validators' weights differ by at most {summary['weights_differ_by']:.4f}")


def plot(logs: list[MinerLog], summary: dict[str, Any], path: Path) -> bool:
    """Draws the loss; False where matplotlib is not installed."""
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
