"""Every shipped configuration is parsed as the program would, and its model, data and strategy are built."""

from pathlib import Path

import pytest
from lightning.pytorch.utilities.model_helpers import is_overridden

from hivetrain.fit_cli import HiveCLI
from hivetrain.model import CausalLM

ROOT = Path(__file__).parent.parent
CONFIGS = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "hivetrain").rglob("*.yaml"))]


def built(path: Path, monkeypatch, *overrides: str) -> HiveCLI:
    monkeypatch.setattr(HiveCLI, "_run_subcommand", lambda self, subcommand: None)
    return HiveCLI("fit", ["-c", str(path), "--trainer.accelerator=cpu", *overrides])


def test_there_are_configurations() -> None:
    assert {path.name for path in CONFIGS} >= {"miner.yaml", "hiveminer.yaml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_no_configuration_suggests_the_logger_that_tells_of_its_owner(path: Path) -> None:
    assert "WandbLogger" not in path.read_text()


MINERS = [pytest.param(path, id=f"{path.parent.name}/{path.name}") for path in CONFIGS if "miner" in path.name]


@pytest.mark.parametrize("path", MINERS)
def test_the_configuration_of_a_miner_builds_everything(path: Path, monkeypatch) -> None:
    cli = built(path, monkeypatch, "--trainer.precision=32-true", "--model.config.n_layer=1")
    assert type(cli.trainer.strategy).__name__ == "HivemindStrategy"
    assert is_overridden("configure_optimizers", cli.model)
    assert cli.datamodule.block_size <= cli.model.lm.config.n_positions
    assert cli.datamodule.vocabulary_size <= cli.model.lm.config.vocab_size
    assert cli.trainer.gradient_clip_val == 1.0


def test_hiveminers_settings(monkeypatch) -> None:
    (path,) = [path for path in CONFIGS if path.name == "hiveminer.yaml"]
    cli = built(path, monkeypatch)
    assert isinstance(cli.model, CausalLM)
    assert cli.model.lm.config.model_type == "gpt2"
    assert cli.model.lm.config.n_layer == 2
    assert cli.datamodule.block_size == 512
    assert cli.model.hparams["learning_rate"] == 1e-3
    assert cli.model.hparams["weight_decay"] == 0.1
    assert cli.model.hparams["warmup_epochs"] == 10
    assert cli.trainer.strategy.target_batch_size == 81920
    assert cli.trainer.gradient_clip_val == 1.0
    assert cli.trainer.max_epochs == -1


def test_an_override_reaches_what_refers_to_it(monkeypatch) -> None:
    path = ROOT / "configs" / "miner.yaml"
    common = ("--trainer.precision=32-true", "--model.config.n_layer=1")
    overrides = ("--model.config.n_positions=48", "--trainer.strategy.run_id=other")
    cli = built(path, monkeypatch, *common, *overrides)
    assert cli.datamodule.block_size == 48
    assert cli.trainer.strategy.run_id == "other"
    assert built(path, monkeypatch, *common).datamodule.block_size == 1024
