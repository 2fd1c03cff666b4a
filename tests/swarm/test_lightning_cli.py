"""The strategy by name, from a configuration file, and as docs/strategy.md shows it."""

import dataclasses
import inspect
import logging
import os
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from peers import FORKSERVER, wait_until
from solo import Module, OnBatch, fit, loader, make_trainer

import hivetrain  # noqa: F401  # registers the alias
from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.strategies import HivemindStrategy
from hivetrain.swarm import INITIAL_PEERS_ENV, SwarmJoinError, count_known_peers

PAGE = Path(__file__).parents[2] / "docs" / "strategy.md"


def test_the_alias_names_the_strategy(monkeypatch):
    monkeypatch.setenv(INITIAL_PEERS_ENV, "")
    trainer = make_trainer(strategy="hivemind", max_steps=2)
    assert isinstance(trainer.strategy, HivemindStrategy)
    trainer.fit(Module(), loader())
    assert trainer.strategy.swarm_epoch == 0  # 8 samples of 1024
    assert trainer.strategy.target_batch_size == 1024


@pytest.mark.parametrize(
    "strategy",
    [
        "hivemind",
        {
            "class_path": "hivetrain.strategies.HivemindStrategy",
            "init_args": {
                "target_batch_size": 8,
                "initial_peers": "",
                "scheduler_fn": {
                    "class_path": "torch.optim.lr_scheduler.ExponentialLR",
                    "init_args": {"gamma": 0.5},
                },
            },
        },
    ],
)
def test_lightning_cli_takes_the_alias_and_the_class_path(strategy, tmp_path, monkeypatch):
    monkeypatch.setenv(INITIAL_PEERS_ENV, "")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    config = {"trainer": {"accelerator": "cpu", "max_steps": 4, "strategy": strategy, **quiet}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(tmp_path / "fit.yaml")]
    cli = LightningCLI(Module, run=False, save_config_callback=None, args=arguments)
    cli.trainer.fit(cli.model, loader())
    assert isinstance(cli.trainer.strategy, HivemindStrategy)
    if strategy != "hivemind":
        assert cli.trainer.strategy.swarm_epoch == 2
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.01 / 4


def test_peers_are_taken_from_the_environment_unless_they_are_given(bootstrap, monkeypatch):
    known = []
    look = OnBatch(lambda trainer: known.append(count_known_peers(trainer.strategy._membership.dht)))
    monkeypatch.setenv(INITIAL_PEERS_ENV, bootstrap)
    fit(Module(), loader(), strategy=HivemindStrategy(), callbacks=[look], max_steps=1)
    fit(Module(), loader(), strategy=HivemindStrategy(initial_peers=[]), callbacks=[look], max_steps=1)
    given = HivemindStrategy(initial_peers=bootstrap.split(","))
    fit(Module(), loader(), strategy=given, callbacks=[look], max_steps=1)
    assert known == [1, 0, 1]
    monkeypatch.setenv(INITIAL_PEERS_ENV, "nonsense")
    with pytest.raises(SwarmJoinError, match=f"nonsense.*{INITIAL_PEERS_ENV}"):
        fit(Module(), loader(), strategy=HivemindStrategy(), max_steps=1)


# docs/strategy.md


def example():
    return re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


def run_example(stop, log=None):
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    source = example()
    assert source.count("StopAtSwarmEpoch(20)") == 1
    namespace = {"Together": Together}
    exec(compile(source.replace("StopAtSwarmEpoch(20)", stop), str(PAGE), "exec"), namespace)
    return namespace["trainer"]


class Together(Callback):
    """Stops when two peers have made an update together."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = any(report.outcome == "averaged" for report in trainer.strategy.rounds)


def test_the_example_of_the_page_trains_in_a_swarm(bootstrap, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(INITIAL_PEERS_ENV, bootstrap)
    monkeypatch.chdir(tmp_path)
    assert sum(bool(line) for line in example().splitlines()) <= 20
    log = tmp_path / "other.log"
    other = FORKSERVER.Process(target=run_other, args=(bootstrap, tmp_path, log))
    other.start()
    try:
        wait_until(lambda: log.exists() and "reachable" in log.read_text(), 90, "the other peer")
        trainer = run_example("Together()")
    finally:
        other.kill()
        other.join()
    assert isinstance(trainer, Trainer)
    assert re.search(r"averaged, group 2 of 2, 100% received", capsys.readouterr().out)


def run_other(bootstrap, directory, log):
    logging.basicConfig(level=logging.INFO)
    os.environ[INITIAL_PEERS_ENV] = bootstrap
    os.chdir(directory)
    run_example("StopAtSwarmEpoch(10**6)", log)


def test_the_page_tells_of_every_option_outcome_field_and_property():
    text = PAGE.read_text()
    names = [name for name in inspect.signature(HivemindStrategy).parameters]
    names += [field.name for field in dataclasses.fields(RoundReport)] + [str(outcome) for outcome in Outcome]
    names += [name for name, value in vars(HivemindStrategy).items() if isinstance(value, property)]
    missing = [name for name in names if f"`{name}`" not in text and name != "root_device"]
    assert not missing
