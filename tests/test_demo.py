"""The demo as a user runs it: a program that starts programs."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hivetrain.demo.reports import MinerLog, summarize

SUMMARY_KEYS = {
    "swarm_epochs", "loss_first", "loss_last", "heldout_loss_first", "heldout_loss_last", "tokens", "tokens_per_s",
    "miners", "wall_s", "digests_equal", "validators", "incentive", "emission", "earned", "cheats", "weights_differ_by",
}  # fmt: skip


TWO_MINERS = ("--miners", "2", "--validators", "0", "--cheats", "none")


def start_demo(out, epochs, *options, timeout_s=240):
    arguments = ["demo", "--out", str(out), "--swarm-epochs", str(epochs), "--timeout-s", str(timeout_s), *options]
    with (out.parent / "demo.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "hivetrain.cli", *arguments], stdout=log, stderr=log)


def wait_until(condition, timeout_s, process):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the demo ended early"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.2)


def logs_of(out, miners=2):
    logs = [MinerLog(out / f"miner-{index}.jsonl") for index in range(miners)]
    for log in logs:
        log.read()
    return logs


def processes_below(out):
    """Live processes that have the demo's output directory on their command line, and what they started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(out) in part for part in process.info["cmdline"] or ()):
            found += [process, *process.children(recursive=True)]
    return {process for process in found if process.pid != os.getpid()}


@pytest.mark.timeout(300)
def test_killing_a_miner_lets_the_other_go_on(tmp_path):
    out = tmp_path / "out"
    process = start_demo(out, 12, *TWO_MINERS)
    try:
        wait_until(lambda: all(2 in log.epochs for log in logs_of(out)), 200, process)
        report = str(out / "miner-0.jsonl")
        victims = [p for p in psutil.process_iter(["cmdline"]) if any(report in c for c in p.info["cmdline"] or ())]
        os.killpg(os.getpgid(victims[0].pid), signal.SIGKILL)
        assert process.wait(timeout=250) == 0, (tmp_path / "demo.log").read_text()
    finally:
        process.kill()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["swarm_epochs"] == 12
    assert [miner["exit_code"] for miner in summary["miners"]] == [-signal.SIGKILL, 0]
    assert summary["miners"][0]["params_digest"] is None
    last = logs_of(out)[1].epochs[11]
    assert last["outcome"] == "alone"
    assert not processes_below(out)


def weights_of(summary, kind):
    """All weights of the miners that cheat in one way, or of the honest ones (None)."""
    return [weight for miner in summary["miners"] if miner["cheat"] == kind for weight in miner["weights"]]


@pytest.mark.timeout(400)
def test_miners_train_one_model_the_free_rider_ends_with_nothing_and_the_validators_agree(tmp_path):
    out = tmp_path / "out"
    process = start_demo(out, 25, timeout_s=380)
    assert process.wait(timeout=390) == 0, (tmp_path / "demo.log").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= SUMMARY_KEYS
    assert summary["swarm_epochs"] == 25
    assert len({miner["peer_id"] for miner in summary["miners"]}) == 3
    assert [miner["exit_code"] for miner in summary["miners"]] == [0, 0, 0]
    assert len({miner["params_digest"] for miner in summary["miners"]}) == 1
    assert summary["heldout_loss_last"] < summary["heldout_loss_first"] - 1
    assert summary["tokens"] > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    outcomes = [record["outcome"] for log in logs_of(out, 3) for record in log.epochs.values()]
    assert outcomes.count("averaged") >= 60, outcomes
    assert [row["hotkey"] for row in summary["validators"]] == list(summary["incentive"])[3:]
    assert summary["weights_differ_by"] <= 0.02
    assert weights_of(summary, "free-rider") == [0.0, 0.0]
    assert sum(weights_of(summary, None)) == pytest.approx(2.0)
    for miner in summary["miners"]:
        audits, hotkey = miner["audits"], miner["hotkey"]
        if miner["cheat"]:
            assert audits["failed"] >= 1
            assert audits["passed"] == 0
            assert summary["incentive"][hotkey] == 0
        else:
            assert audits["passed"] >= 1
            assert audits["failed"] == audits["missing"] == 0
            assert summary["incentive"][hotkey] > 0.2
            assert miner["verified"] > 0
    assert not processes_below(out)


@pytest.mark.slow  # eight programs on two cores; tests/swarm/test_audited_fit.py has each cheat with two
@pytest.mark.timeout(600)
def test_every_kind_of_cheat_is_found_in_real_processes(tmp_path):
    out = tmp_path / "out"
    kinds = ("free-rider", "lazy", "stale", "copied", "over-claim")
    options = ("--miners", "7", "--validators", "1", "--audit-probability", "0.5", "--cheats", ",".join(kinds))
    process = start_demo(out, 15, *options, timeout_s=580)
    assert process.wait(timeout=590) == 0, (tmp_path / "demo.log").read_text()
    summary = json.loads((out / "summary.json").read_text())
    for miner in summary["miners"]:
        if miner["cheat"]:
            assert miner["weights"] == [0.0], miner
            assert miner["audits"]["passed"] == 0, miner
        else:
            assert miner["audits"]["failed"] == 0, miner
            assert miner["weights"][0] > 0.3, miner
    assert not processes_below(out)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_demo_within_ten_seconds_and_leaves_no_process(tmp_path, signum, status):
    out = tmp_path / "out"
    process = start_demo(out, 1000)
    try:
        wait_until(lambda: any(log.epochs for log in logs_of(out)), 150, process)
        process.send_signal(signum)
        started = time.monotonic()
        assert process.wait(timeout=30) == status
        assert time.monotonic() - started < 10
        assert not processes_below(out)
    finally:
        process.kill()


def test_the_summary_tells_of_miners_that_did_not_finish(tmp_path):
    ended, died = MinerLog(tmp_path / "a"), MinerLog(tmp_path / "b")
    ended.path.write_text(
        '{"event": "start", "swarm_epoch": 0, "wall_s": 0, "peer_id": "A", "heldout_loss": 8.0}\n'
        '{"event": "epoch", "swarm_epoch": 0, "wall_s": 1, "loss": 8.0, "samples": 30, "tokens": 300}\n'
        '{"event": "end", "swarm_epoch": 1, "wall_s": 2, "samples": 30, "tokens": 300, "params_digest": "d",'
        ' "heldout_loss": 7.0}\n'
    )
    died.path.write_text(
        '{"event": "start", "swarm_epoch": 0, "wall_s": 0, "peer_id": "B", "heldout_loss": 8.0}\n'
        '{"event": "epoch", "swarm_epoch": 0, "wall_s": 1, "loss": 4.0, "samples": 10, "tokens": 100}\n{"event": "ep'
    )
    for log in (ended, died):
        log.read()
    summary = summarize([ended, died], [0, -9], 3.0)
    assert summary["loss_first"] == 7.0  # weighted by samples
    assert summary["tokens_per_s"] == 150
    assert [miner["params_digest"] for miner in summary["miners"]] == ["d", None]
    assert [miner["exit_code"] for miner in summary["miners"]] == [0, -9]
    assert summary["digests_equal"]
    assert not summarize([died], [-9], 3.0)["digests_equal"]
