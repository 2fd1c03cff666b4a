import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_honest_and_dishonest_microbatches_stay_away_from_the_tolerances():
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
    least = {name.partition(": ")[0]: 5.0 if "same" in name else 4.0 for name, *_ in rows}
    assert len(rows) == 4
    assert sorted(least.values()) == [4.0, 5.0]
    for name, *cells in rows:
        assert min(map(float, cells)) >= least[name.partition(": ")[0]], name
