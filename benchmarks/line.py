"""Rounds on a line as people have it: peers in network namespaces of their own, each upload limited by ``tc tbf``.

    python benchmarks/line.py [--mbit 100] [--peers 2 3] [--millions 10]

Needs root and iproute2; where namespaces or tc are refused it says so and exits with 77. Seconds are of exchange and
vote on the slowest member, median of the repeats, without matchmaking and without the first round, which dials.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from exchange_members import MEET_S, ROUND_S, joined  # noqa: E402
from namespaces import SKIPPED, Host, NotPermitted, bytes_sent, hosts  # noqa: E402
from swarm_programs import programs, questions, table  # noqa: E402

CODECS = ("none", "fp16", "int8")
TRANSPORTS = {"tls": "direct", "plain": "direct-plain", "libp2p": "libp2p"}
HEADER = [
    "",
    "codec",
    "peers",
    "params",
    "seconds",
    "MB sent",
    "of the line",
    "of its bytes at line rate",
    "on the wire",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100, help="upload of each peer in Mbit/s")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=CODECS)
    parser.add_argument("--peers", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--millions", type=float, default=10, help="params, in millions")
    parser.add_argument("--limit", type=float, help="the peers' own max_upload_mbit_s")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="file for the rows as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the namespaces are removed
    try:
        rows = [row for num_peers in options.peers for row in measure_group(num_peers, options)]
    except NotPermitted as error:
        print(f"no lines to measure on: {error}", file=sys.stderr)
        sys.exit(SKIPPED)
    print(table(HEADER, [cells(row) for row in rows]))
    print(f"\nUpload {options.mbit:g} Mbit/s each; {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f} at the end.")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def measure_group(num_peers: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each transport and codec."""
    rows = []
    numel = int(options.millions * 1e6)
    with (
        hosts(num_peers, options.mbit) as (switch, lines),
        programs(meet, 1, switch) as (meeting,),
    ):
        meeting.ask()
        addresses = meeting.answer()
        with programs(work, num_peers, lines, addresses, options.limit) as peers:
            for transport in options.transports:
                for codec in options.codecs:
                    for peer in peers:
                        peer.ask(transport=transport, codec=codec, numel=numel, repeats=options.repeats)
                    members = [peer.answer(MEET_S + (options.repeats + 1) * ROUND_S) for peer in peers]
                    rounds = [summary(reports, options.mbit) for reports in zip(*members, strict=True)]
                    row = {
                        "transport": transport,
                        "codec": codec,
                        "peers": num_peers,
                        "params": numel,
                        "rounds": rounds,
                    }
                    print(row, file=sys.stderr)
                    rows.append(row)
    return rows


def summary(members: tuple[dict[str, float], ...], mbit_s: float) -> dict[str, float]:
    """One round: of the member that took the longest, and of the line that had the most to carry."""
    seconds = max(member["seconds"] for member in members)
    sent = max(member["sent"] for member in members)
    line_s = sent * 8 / (mbit_s * 1e6)
    return {
        "seconds": seconds,
        "mb_sent": sent / 1e6,
        "share": line_s / seconds,
        "times": seconds / line_s,
        "wire": max(member["wire"] for member in members) / sent,
    }


def cells(row: dict[str, Any]) -> list[str]:
    median = {key: statistics.median(round_[key] for round_ in row["rounds"]) for key in row["rounds"][0]}
    return [
        row["transport"],
        row["codec"],
        str(row["peers"]),
        f"{row['params'] / 1e6:g}M",
        f"{median['seconds']:.3f}",
        f"{median['mb_sent']:.1f}",
        f"{median['share']:.1%}",
        f"{median['times']:.3f}",
        f"{median['wire']:.3f}",
    ]


def meet(connection: Connection, rank: int, host: Host) -> None:
    """The DHT node through which all programs find each other."""
    host.enter()
    from hivetrain.swarm import start_dht, visible_maddrs

    dht = start_dht([], host_maddrs=host.maddrs)
    try:
        for _ in questions(connection):
            connection.send(visible_maddrs(dht))
    finally:
        dht.shutdown()


def work(connection: Connection, rank: int, lines: list[Host], addresses: list[str], limit: float | None) -> None:
    """One member: answers with what each round but the first took."""
    lines[rank].enter()
    import torch

    torch.set_num_threads(1)
    for asked in questions(connection):
        vector = torch.randn(asked["numel"], generator=torch.Generator().manual_seed(rank))
        transport, rounds = TRANSPORTS[asked["transport"]], []
        with joined(asked["codec"], addresses, len(lines), transport, lines[rank].maddrs, limit) as average_once:
            for _ in range(asked["repeats"] + 1):
                before = bytes_sent()
                report = average_once(vector)
                wire = bytes_sent() - before
                rounds.append({"seconds": report.exchange_s, "sent": report.bytes_sent, "wire": wire})
        connection.send(rounds[1:])


if __name__ == "__main__":
    main()
