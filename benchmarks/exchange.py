"""The exchange beside what else moves bytes between the same programs: raw TCP, gloo and hivemind's averager.

One command, one run, so that all rows meet the same machine. Seconds are of the slowest member, median of the repeats;
matchmaking is left out, and hivetrain's include vote and digest, which the others do not have.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from exchange_members import MEET_S, ROUND_S, TRANSPORTS, work
from swarm_programs import MB, meeting_point, programs, table

CODECS = ("none", "fp16", "int8")
PARTS = ("raw", "gloo", "hivemind", *TRANSPORTS)
HIVEMIND_CODECS = ("none", "fp16")  # its 8-bit codecs fail on numpy 2
HEADER = ["", "codec", "peers", "params", "seconds", "MB/s", "of gloo", "CPU s per MB", "memory MB"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=CODECS)
    parser.add_argument("--peers", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--millions", nargs="+", type=float, default=[10, 50], help="params, in millions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the rows as JSON")
    options = parser.parse_args()
    sizes = [int(millions * 1e6) for millions in options.millions]
    rows: list[dict[str, Any]] = []
    for num_peers in options.peers:
        rows += measure_group(num_peers, sizes, options.repeats, kinds(options.parts, options.codecs))
    rows.sort(key=lambda row: (row["peers"], row["params"]))
    print(table(HEADER, [cells(row, rows) for row in rows]))
    print(f"\n{os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} at the end.")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def kinds(parts: list[str], codecs: list[str]) -> list[tuple[str, str]]:
    """What is measured: (part, codec)."""
    found = []
    for part in parts:
        known = {"raw": ("none",), "gloo": ("none",), "hivemind": HIVEMIND_CODECS}.get(part, CODECS)
        found += [(part, codec) for codec in codecs if codec in known]
    return found


def measure_group(
    num_peers: int, sizes: list[int], repeats: int, chosen: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """One row for each kind and size."""
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        meeting_point() as addresses,
        programs(work, num_peers, num_peers, str(Path(folder) / "gloo"), addresses) as peers,
    ):
        for part, codec in chosen:
            for peer in peers:
                peer.ask(part=part, codec=codec, sizes=sizes, repeats=repeats)
            answers = [peer.answer(MEET_S + len(sizes) * (repeats + 1) * ROUND_S) for peer in peers]
            for numel, members in zip(sizes, zip(*answers, strict=True), strict=True):
                seconds = statistics.median(map(max, zip(*(member["seconds"] for member in members), strict=True)))
                cpu_s = statistics.fmean(sum(member["cpu"].values()) for member in members) / repeats
                row = {
                    "part": part, "codec": codec, "peers": num_peers, "params": numel, "seconds": seconds,
                    "mb_per_s": 4 * numel / MB / seconds, "cpu_s_per_mb": cpu_s / (4 * numel / MB),
                    "memory_mb": max(member["memory_mb"] for member in members),
                }  # fmt: skip
                print(row, file=sys.stderr)
                rows.append(row)
    return rows


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    like = [r for r in rows if r["part"] == "gloo" and (r["peers"], r["params"]) == (row["peers"], row["params"])]
    names = {"raw": "raw TCP, one stream", "gloo": "gloo all-reduce", "hivemind": "hivemind's averager"}
    return [
        names.get(row["part"], f"hivetrain, {row['part']}"),
        row["codec"],
        str(row["peers"]),
        f"{row['params'] / 1e6:g}M",
        f"{row['seconds']:.3f}",
        f"{row['mb_per_s']:,.0f}",
        f"{like[0]['seconds'] / row['seconds']:.2f}" if like else "",
        f"{row['cpu_s_per_mb']:.4f}",
        f"{row['memory_mb']:.0f}",
    ]


if __name__ == "__main__":
    main()
