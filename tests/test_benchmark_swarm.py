"""The swarm's benchmarks run and measure something; what, is for docs/benchmarks.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def rows_of(*command):
    """The output of a benchmark, and the cells of its tables' rows."""
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("|") and "---" not in line]
    return ended.stdout, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_exchange_benchmark_measures_every_way():
    options = ("--peers", "2", "--millions", "0.3", "--repeats", "1")
    _, (header, *rows) = rows_of("benchmarks/exchange.py", *options)
    found = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}
    ways = {"raw TCP, one stream": ["none"], "gloo all-reduce": ["none"], "hivemind's averager": ["none", "fp16"]}
    ways |= {f"hivetrain, {way}": ["none", "fp16", "int8"] for way in ("libp2p", "plain", "tls")}
    assert set(found) == {(way, codec) for way, codecs in ways.items() for codec in codecs}
    for row in found.values():
        assert float(row["MB/s"].replace(",", "")) > 0
        assert row["params"] == "0.3M"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_swarm_benchmark_measures_all_its_parts():
    output, rows = rows_of("benchmarks/swarm.py", "--quick", "--parts", "abc")
    found = {row[0]: row[1:] for row in rows}

    assert float(found["alone"][3]) == 1.0
    for mode in ("exact", "overlapped"):
        _, peers, _, efficiency, *_, failed = found[mode]
        assert (peers, failed) == ("2", "0")
        assert float(efficiency) > 0.1

    assert float(found["none"][1].rstrip("x")) == 1.0
    assert float(found["powersgd(2)"][1].rstrip("x")) > 2
    assert float(found["none"][2]) > 1  # a loss

    assert float(found["all of it"][0]) >= float(found["download of the state, check and load"][0]) > 0
    assert float(found["sum"][1]) > float(found["training"][1]) > 0
    assert re.search(r"hivemind \d", output)
