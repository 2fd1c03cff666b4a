"""The benchmarks run and measure something; how much is for docs/benchmarks.md."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_overhead_benchmark_measures_all_four_settings():
    command = ["benchmarks/overhead.py", "--repeats", "1", "--seconds", "0.1", "--target-batch-size", "16"]
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
    rows = [line.strip("|").split("|") for line in ended.stdout.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 4
    for name, speed, speed_ratio, cost, cost_ratio in rows:
        figures = [float(text.split()[0].replace(",", "")) for text in (speed, speed_ratio, cost, cost_ratio)]
        assert min(figures) > 0, name
    assert rows[0][2].strip() == rows[0][4].strip() == "1.000"
    assert "; 0 rounds failed" in ended.stdout
