"""Loggers by configuration: wandb and CSV side by side, miners in one group, offline, and nothing private anywhere."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hivetrain.fit_cli import PRIVATE, HiveCLI
from hivetrain.keys import Wallet

pytest.importorskip("wandb")
ROOT = Path(__file__).parents[1]
SEED = "5e" * 32
MINER = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 4,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "strategy": {
            "class_path": "hivetrain.strategies.HivemindStrategy",
            "init_args": {
                "run_id": "my-run",
                "target_batch_size": 8,
                "initial_peers": [],
                "identity_path": "private-place/miner.id",
            },
        },
    },
    "model": {
        "class_path": "hivetrain.model.CausalLM",
        "init_args": {"config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}, "vocab_size": 4096},
    },
    "data": {"class_path": "hivetrain.data.RefinedWebDataModule", "init_args": {"block_size": 32, "batch_size": 4}},
}


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory):
    """Where a whole miner has trained with both loggers, offline by the environment, with keys beside it."""
    place = tmp_path_factory.mktemp("run")
    (place / "private-place").mkdir()
    (place / "miner.yaml").write_text(yaml.safe_dump(MINER))
    wallet = Wallet("w", "h", str(place / "private-place"))
    wallet.hotkey_file.parent.mkdir(parents=True)
    wallet.hotkey_file.write_text(f'{{"secretSeed": "0x{SEED}"}}')
    configs = ["-c", "miner.yaml", "-c", str(ROOT / "configs" / "wandb.yaml")]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "hivetrain.cli",
            "fit",
            *configs,
            "--log-format",
            "json",
            "--trainer.log_every_n_steps=1",
        ],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_API_KEY": "f" * 40},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (place / "logs" / "stderr").write_text(ended.stderr)
    return place


def wandb_payloads(place):
    """What the run's own file holds: LevelDB's log format, blocks of 32 KiB behind seven bytes of header."""
    (file,) = place.glob("logs/wandb/offline-run-*/run-*.wandb")
    data, at, payload = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield payload
            payload = b""


def wandb_records(place):
    from wandb.proto import wandb_internal_pb2

    for payload in wandb_payloads(place):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


@pytest.mark.timeout(240)
def test_a_run_is_written_offline_in_the_group_of_its_run_id(run_directory):
    (run,) = [record.run for record in wandb_records(run_directory) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group) == ("hivetrain", "my-run")
    assert run.host == "miner"


def test_wandb_has_loss_and_swarm(run_directory):
    logged = {
        item.key or "/".join(item.nested_key) for record in wandb_records(run_directory) for item in record.history.item
    }
    assert {"train/loss", "swarm/epoch", "swarm/num_peers", "swarm/exchange_s"} <= logged


def test_csv_has_the_same(run_directory):
    (file,) = run_directory.glob("logs/my-run/version_0/metrics.csv")
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["swarm/epoch"]) for row in rows if row["swarm/epoch"]] == [0, 1]
    assert len([row for row in rows if row["train/loss"]]) == 4


def test_nothing_private_is_in_any_file_that_was_logged(run_directory):
    files = [path for path in (run_directory / "logs").rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.suffix for path in files} >= {".wandb", ".csv", ".yaml", ".log"}
    for path in files:
        content = path.read_bytes()
        assert SEED.encode() not in content, path
        assert b"private-place" not in content, path
        assert b"f" * 40 not in content, path
    written = b"".join(wandb_payloads(run_directory))
    assert b"my-run" in written
    assert SEED.encode() not in written
    assert b"private-place" not in written


def test_wandb_records_neither_command_line_nor_host_nor_terminal(run_directory):
    kinds = [record.WhichOneof("record_type") for record in wandb_records(run_directory)]
    assert "output_raw" not in kinds
    assert "output" not in kinds
    assert not list(run_directory.glob("logs/wandb/*/files/wandb-metadata.json"))
    written = b"".join(wandb_payloads(run_directory))
    assert b"miner.yaml" not in written
    assert b"/ip4/" not in written


def test_the_saved_configuration_lacks_only_what_is_private_and_can_be_run(run_directory, monkeypatch):
    saved = run_directory / "logs" / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    options = config["trainer"]["strategy"]["init_args"]
    assert options["run_id"] == "my-run"
    assert not set(PRIVATE) & set(options)
    monkeypatch.setattr(HiveCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(run_directory)
    again = HiveCLI("fit", ["-c", str(saved)])
    assert again.trainer.strategy.run_id == "my-run"
    assert again.model.hparams["vocab_size"] == 4096
