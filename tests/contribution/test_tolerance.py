import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_honest_and_dishonest_microbatches_stay_five_times_away_from_the_tolerance():
    ended = subprocess.run(
        [sys.executable, "benchmarks/tolerance.py", "--microbatches", "1", "--points", "0", "20"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    _, _, factors = ended.stdout.partition("Distance from the tolerance")
    rows = [line.strip("| ").split("|") for line in factors.splitlines() if ": " in line and line.startswith("|")]
    alike = [cells for name, *cells in rows if "in the miner's precision" in name]
    assert len(alike) == 2
    assert all(len(cells) == 2 for cells in alike)
    assert min(float(cell) for cells in alike for cell in cells) >= 5
