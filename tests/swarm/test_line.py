"""Rounds on a line of 100 Mbit/s between network namespaces: full of payload."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SKIPPED = 77


@contextmanager
def benchmark(*options, **environment):
    """The benchmark at work; in the end there must be nothing left of it."""
    command = [sys.executable, "benchmarks/line.py", "--peers", "2", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes) as program:
        try:
            yield program
        finally:
            if program.poll() is None:
                os.killpg(program.pid, signal.SIGKILL)
    assert not namespaces(program)


def namespaces(program):
    """Names of those that it has made."""
    folder = Path("/run/netns")
    return [path.name for path in folder.glob(f"hivetrain-{program.pid}-*")] if folder.exists() else []


def daemons(processes):
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += [process] * process.name().startswith("p2pd")
    return found


def skip_if_refused(program, errors):
    if program.returncode == SKIPPED:
        pytest.skip(errors.strip().splitlines()[-1])


def test_a_line_is_full_of_payload_and_a_round_takes_little_more_than_its_bytes(tmp_path):
    rows = tmp_path / "rows.json"
    chosen = ("--transports", "tls", "--codecs", "fp16", "none", "--millions", "4")
    with benchmark(*chosen, "--json", str(rows)) as program:
        _, errors = program.communicate(timeout=200)
    skip_if_refused(program, errors)
    assert program.returncode == 0, errors
    measured = {row["codec"]: row["rounds"] for row in json.loads(rows.read_text())}
    assert set(measured) == {"fp16", "none"}
    for codec, rounds in measured.items():
        # Of the best round: the others tell what else the machine had to do.
        assert max(round_["share"] for round_ in rounds) >= 0.90, (codec, rounds)
        assert min(round_["times"] for round_ in rounds) <= 1.15, (codec, rounds)
        for round_ in rounds:  # else the line is not what it should be
            assert round_["share"] < 1, (codec, rounds)
            assert 1 < round_["wire"] < 1.15, (codec, rounds)


def test_nothing_is_left_of_a_benchmark_that_is_interrupted():
    with benchmark("--repeats", "100") as program:
        deadline, started = time.monotonic() + 60, []
        while len(daemons(started)) < 3 and program.poll() is None:
            assert time.monotonic() < deadline, "its peers do not start"
            time.sleep(0.02)
            started = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        _, errors = program.communicate(timeout=60)
    skip_if_refused(program, errors)
    assert program.returncode not in (0, SKIPPED)
    assert "KeyboardInterrupt" in errors
    assert not psutil.wait_procs(started, 10)[1]


def test_without_the_tools_for_namespaces_the_benchmark_says_so_and_measures_nothing():
    with benchmark(PATH="/nowhere") as program:
        output, errors = program.communicate(timeout=60)
    assert program.returncode == SKIPPED, errors
    assert "install iproute2" in errors
    assert not output
