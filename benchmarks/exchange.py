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
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from swarm_exchange import MEET_S, ROUND_S, average, repeat, send_raw
from swarm_programs import MB, meeting_point, programs, questions, table

CODECS = ("none", "fp16", "int8")
TRANSPORTS = {"libp2p": "libp2p", "plain": "direct-plain", "tls": "direct"}
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


def work(connection: Connection, rank: int, num_peers: int, store: str, addresses: list[str]) -> None:
    """One member."""
    import torch
    import torch.distributed as gloo

    torch.set_num_threads(1)
    gloo.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_peers)
    try:
        for asked in questions(connection):
            generator = torch.Generator().manual_seed(rank)
            vectors = [torch.randn(numel, generator=generator) for numel in asked["sizes"]]
            part, codec, repeats = asked["part"], asked["codec"], asked["repeats"]
            if part == "raw":
                answer = [send_raw(vector, rank, repeats) for vector in vectors]
            elif part == "gloo":
                answer = [repeat(lambda v=vector: gloo.all_reduce(v), repeats) for vector in vectors]
            elif part == "hivemind":
                answer = [average_by_hivemind(codec, vector, addresses, num_peers, repeats) for vector in vectors]
            else:
                answer = average(codec, vectors, addresses, num_peers, repeats, TRANSPORTS[part])
            connection.send(answer)
    finally:
        gloo.destroy_process_group()


def average_by_hivemind(codec: str, vector: Any, addresses: list[str], num_peers: int, repeats: int) -> dict[str, Any]:
    """hivemind's own averager; its time is taken in its own process, from the group to the end of the all-reduce."""
    import multiprocessing

    from hivemind.averaging import DecentralizedAverager
    from hivemind.compression import Float16Compression, NoCompression

    from hivetrain.swarm import start_dht

    class Timed(DecentralizedAverager):
        seconds = multiprocessing.Value("d", 0.0)

        async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            try:
                return await super()._aggregate_with_group(*args, **kwargs)
            finally:
                self.seconds.value = time.monotonic() - start

    multiprocessing.set_start_method("fork", force=True)  # hivemind's own; a local class cannot be pickled
    dht = start_dht(addresses)
    averager = Timed(
        [vector], dht, start=True, prefix=f"hivemind{codec}{vector.numel()}", target_group_size=num_peers,
        min_group_size=num_peers, min_matchmaking_time=5.0, request_timeout=1.0,
        compression=Float16Compression() if codec == "fp16" else NoCompression(),
    )  # fmt: skip

    def once() -> float:
        deadline = time.monotonic() + ROUND_S
        while time.monotonic() < deadline:
            found = averager.step(timeout=ROUND_S)
            if found is not None and len(found) == num_peers:
                return Timed.seconds.value
        raise TimeoutError("hivemind found no group")

    try:
        return repeat(once, repeats)
    finally:
        averager.shutdown()
        dht.shutdown()


if __name__ == "__main__":
    main()
