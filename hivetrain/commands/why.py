"""``hivetrain why``: each factor of a miner's score, from a validator's state file."""

import argparse
from collections.abc import Iterable
from typing import Any

HELP = "why a hotkey has the weight it has: audits, leaves, errors, rounds, tempos"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hotkey", metavar="HOTKEY", help="address of the miner, or an unambiguous beginning of it")
    parser.add_argument(
        "--state", default="validator.db", metavar="FILE", help="the validator's state file (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    import json

    from hivetrain.validator.explain import explain
    from hivetrain.validator.schema import open_read_only

    connection = open_read_only(args.state)
    try:
        found = explain(connection, args.hotkey)
    finally:
        connection.close()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    print(f"hotkey {found['hotkey']}, uid {found['uid']}, run {found['run_id']}")
    if found["weight"] is None:
        print("no tempo has been scored yet")
    else:
        print(f"weight {found['weight']:.6f}, moving average {found['average']:.1f} samples a tempo")
    _table(
        console,
        "Tempos",
        ("until block", "verified samples", "contributions", "average", "weight", "weights were"),
        [
            (
                tempo["block"],
                _verified(tempo),
                _counts(tempo["verdicts"]),
                f"{tempo['average']:.1f}",
                f"{tempo['weight']:.6f}",
                " ".join(filter(None, (f"{tempo['status']}:", tempo["receipt"]))),
            )
            for tempo in found["tempos"]
        ],
    )
    _table(
        console,
        "Audits",
        ("epoch", "samples", "beacon", "leaf", "place", "sketch off by", "loss off by", "verdict", "why"),
        [row for record in found["audits"] for row in _audit_rows(record)],
    )
    _table(
        console,
        "Not paid",
        ("epoch", "samples", "seen in", "beacon", "verdict", "why"),
        [
            tuple(record[key] for key in ("swarm_epoch", "samples", "seen_block", "beacon_block", "verdict", "reason"))
            for record in found["unpaid"]
        ],
    )
    _table(
        console,
        "Rounds whose average is not what its members committed to (nobody in particular is to blame)",
        ("epoch", "off by", "at most"),
        [
            (entry["swarm_epoch"], _number(entry["sum_error"]), _number(entry["tolerance"]))
            for entry in found["rounds_flagged"]
        ],
    )
    _table(
        console,
        "Rounds whose average nobody can compare with that, as members had no readable record",
        ("epoch", "members without a record"),
        [(entry["swarm_epoch"], entry["unrecorded"]) for entry in found["rounds_unchecked"]],
    )
    for record in found["noted"]:
        print(f"epoch {record['swarm_epoch']}: {record['note']}")


def _audit_rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    head = (record["swarm_epoch"], record["samples"], record["beacon_block"])
    tail = (record["verdict"] or "open", record["reason"])
    if not record["leaves"]:
        return [(*head, ", ".join(map(str, record["drawn"])), "", "", "", *tail)]
    return [
        (
            *(head if number == 0 else ("", "", "")),
            leaf["index"],
            "/".join(map(str, leaf["place"])),
            f"{_number(leaf['sketch_error'])} of {_number(leaf['tolerance']['sketch'])}",
            f"{_number(leaf['loss_error'])} of {_number(leaf['tolerance']['loss'])}",
            *(tail if number == 0 else ("", "")),
        )
        for number, leaf in enumerate(record["leaves"])
    ]


def _verified(tempo: dict[str, Any]) -> str:
    if tempo["forfeited"]:
        return "0, forfeited"
    unpaid = tempo["samples"] and not tempo["average"]
    return f"{tempo['samples']}, no audit passed yet" if unpaid else str(tempo["samples"])


def _counts(verdicts: dict[str, int]) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2g}"


def _table(console: Any, title: str, columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    if not rows:
        return
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print()
    console.print(table)
