"""The commonest mistakes: each is one clear line with the next step, status 2 and no traceback.

Where a validator has no permit is tested with the validator.
"""

import errno
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hivetrain.averaging.settings import SettingsMismatch
from hivetrain.chain.base import Code, LedgerError
from hivetrain.cli import main
from hivetrain.doctor.mistakes import explain
from hivetrain.errors import UserError
from hivetrain.swarm import start_dht, visible_maddrs

ROOT = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWERA6naQ3663hGS7FwyZyaNQkecVMeidTvQnG3ww1QGF1"

CONFIG = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "strategy": {
            "class_path": "hivetrain.strategies.HivemindStrategy",
            "init_args": {"target_batch_size": 8, "initial_peers": [], "bootstrap_timeout": 8.0},
        },
    },
    "model": {"config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}, "vocab_size": 16},
    "data": {"class_path": "toy_data.CountingData"},
}
PLAIN = "--trainer.strategy=auto"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


@pytest.fixture
def dht():
    running = start_dht([])
    yield running
    running.shutdown()


def fit(config, *options, **popen):
    """One miner's program, to its end."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "miners" / "miner.py"), "-c", config, *options],
        env=environment | popen.pop("env", {}),
        capture_output=True,
        text=True,
        timeout=200,
        **popen,
    )


def refusal(done):
    """The line with which the program ended."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("miner.py: error: ")]
    return line.removeprefix("miner.py: error: ")


def test_no_peer_answers(config):
    line = refusal(fit(config, f"--trainer.strategy.initial_peers={NOBODY}"))
    assert line.startswith(f"cannot join the swarm through {NOBODY}: ")
    assert "check the addresses and the firewall between" in line


def test_the_bootstrap_is_down(config):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    line = refusal(fit(config, f"--trainer.strategy.initial_peers={url}"))
    assert line.startswith(f"no bootstrap server gave the swarm's address: {url}: Connection refused")
    assert "check the URLs and that a bootstrap runs" in line


def test_the_port_is_taken(config):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        maddr = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        line = refusal(fit(config, f"--trainer.strategy.host_maddrs=[{maddr}]"))
    assert line.startswith(f"cannot listen on {maddr}: Address already in use")
    assert "choose another" in line


AHEAD = """
import time
real = time.time
time.time = lambda: real() + 60
"""


def test_the_clock_is_off_by_a_minute(config, tmp_path, dht):
    (tmp_path / "sitecustomize.py").write_text(AHEAD)
    path = os.pathsep.join([str(tmp_path), PATHS])
    peer = f"--trainer.strategy.initial_peers={visible_maddrs(dht)[0]}"
    line = refusal(fit(config, peer, env={"PYTHONPATH": path}))
    assert "local time must be within 3" in line
    assert "set it by NTP" in line


def test_the_hotkey_is_not_registered(config, tmp_path):
    ledger = str(tmp_path / "ledger.db")
    assert main(["ledger", "create", ledger]) == 0
    assert main(["keys", "new", "--wallet=w", "--hotkey=h", "--wallet-path", str(tmp_path)]) == 0
    who = [f"--contribute.chain={ledger}", "--contribute.wallet=w", "--contribute.hotkey=h"]
    data = {"class_path": "hivetrain.data.RefinedWebDataModule", "init_args": {"block_size": 32}}
    wide = {**CONFIG, "data": data, "model": {**CONFIG["model"], "vocab_size": 8192}}
    wide["model"]["config"] = {**CONFIG["model"]["config"], "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    Path(config).write_text(yaml.safe_dump(wide))
    done = fit(config, "--contribute=hivetrain.callbacks.ContributionPublisher", *who,
               f"--contribute.wallet_path={tmp_path}")  # fmt: skip
    line = refusal(done)
    assert "is not registered, so nobody could pay it: hivetrain chain register --chain" in line


def test_the_data_is_not_there(config):
    data = {"class_path": "hivetrain.data.RefinedWebDataModule", "init_args": {"block_size": 32}}
    data["init_args"]["corpus"] = {"class_path": "hivetrain.data.FolderCorpus", "init_args": {"path": "/nowhere"}}
    Path(config).write_text(yaml.safe_dump({**CONFIG, "data": data}))
    assert "/nowhere" in refusal(fit(config, PLAIN))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model.vocab_size=1000000000000"], "128000000000000 bytes"),  # when the model is built
        (["--model.vocab_size=9000000", "--model.config.n_embd=2", "--model.config.n_head=1", "--data.rows=65536",
          "--data.batch_size=65536"], "bytes"),  # in training
    ],
)  # fmt: skip
def test_the_memory_does_not_suffice(config, options, wanted):
    line = refusal(fit(config, PLAIN, *options))
    assert line.startswith("out of memory (another ")
    assert f"{wanted} did not fit): lower data.batch_size (the swarm's target_batch_size stays)" in line


def test_the_model_is_not_the_runs(config, tmp_path):
    endless = [sys.executable, str(ROOT / "miners" / "miner.py"), "-c", config, "--trainer.max_epochs=-1"]
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(endless, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        said = next(line for line in first.stderr if "reachable at" in line)
        address = said.rpartition("reachable at ")[2].strip()
        line = refusal(fit(config, f"--trainer.strategy.initial_peers={address}", "--model.config.n_layer=2"))
    finally:
        first.terminate()
        first.communicate(timeout=30)
    assert line.startswith("run 'hivetrain' has 1 peer(s) with other settings: model is ")
    assert line.endswith("Use the run's settings or another run_id.")


def test_the_disk_is_full_when_the_last_checkpoint_is_written(config, tmp_path):
    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    done = fit(config, PLAIN, "--checkpoint.dirpath=kept", preexec_fn=small_disk)
    line = refusal(done)
    assert line.startswith("cannot write a checkpoint to kept: File too large. Free some space there")
    assert os.listdir(tmp_path / "kept") == []


def test_errors_of_libraries_become_one_line_with_the_next_step():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert explain(raised.value).startswith("out of memory (another 4000000000000000 bytes did not fit): lower data.b")
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8")
    assert explain(on_gpu).startswith("out of memory (another 2.00 GiB did not fit): lower data.batch_size")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/tokens.db")
    assert explain(full).startswith("the disk is full at /data/tokens.db: free some space")
    wrapped = RuntimeError("torch's own words")
    wrapped.__cause__ = full
    assert explain(wrapped) == explain(full)


def test_refusals_of_swarm_and_chain_get_a_next_step():
    assert explain(SettingsMismatch("run 'r' has other settings.\nUse them")) == "run 'r' has other settings. Use them"
    assert "no_permit: wait" in explain(LedgerError(Code.NO_PERMIT, "wait for a permit"))
    late = UserError("cannot join the swarm through /x: local time must be within 3 seconds")
    assert "set it by NTP" in explain(late)
    assert explain(explain_again := UserError("block_size is 40")) == str(explain_again)


@pytest.mark.parametrize(
    "bug", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x"), OSError(5, "x")]
)
def test_a_bug_is_not_explained_away(bug):
    assert explain(bug) is None
