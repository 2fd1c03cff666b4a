"""The swarm benchmark runs and measures something; what, is for docs/benchmarks.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_swarm_benchmark_measures_all_its_parts():
    ended = subprocess.run(
        [sys.executable, "benchmarks/swarm.py", "--quick", "--parts", "abcd"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.stdout.splitlines() if "|" in line]
    found = {row[0]: row[1:] for row in rows if not row[0].startswith("--")}

    assert float(found["alone"][3]) == 1.0
    for mode in ("exact", "overlapped"):
        _, peers, _, efficiency, *_, failed = found[mode]
        assert (peers, failed) == ("2", "0")
        assert float(efficiency) > 0.1

    for name in ("raw TCP, one stream", "gloo all-reduce", "hivetrain, none", "hivetrain, fp16", "hivetrain, int8"):
        assert float(found[name][3].replace(",", "")) > 0, name

    assert float(found["none"][1].rstrip("x")) == 1.0
    assert float(found["powersgd(2)"][1].rstrip("x")) > 2
    assert float(found["none"][2]) > 1  # a loss

    assert float(found["all of it"][0]) >= float(found["download of the state, check and load"][0]) > 0
    assert float(found["sum"][1]) > float(found["training"][1]) > 0
    assert re.search(r"hivemind \d", ended.stdout)
