import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hivetrain.cli import LIGHTNING_COMMANDS, main
from hivetrain.config_errors import describe

ROOT = Path(__file__).parent.parent
MINER = (sys.executable, str(ROOT / "miners" / "miner.py"))
HIVETRAIN = (sys.executable, "-m", "hivetrain.cli")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_model_summary: false
  num_sanity_val_steps: 0
model:
  config: {n_layer: 1, n_embd: 32, n_head: 2, n_positions: 32}
  vocab_size: 16
  learning_rate: 0.01
data:
  class_path: toy_data.CountingData
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return path


def with_change(config: Path, *keys, value) -> None:
    settings = yaml.safe_load(config.read_text())
    node = settings
    for key in keys[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    node[keys[-1]] = value
    config.write_text(yaml.safe_dump(settings))


def start(*command: str, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True, timeout=120)


def refusal(capsys, *arguments: str) -> str:
    """The one line on stderr with which the program refuses the arguments."""
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hivetrain: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("hivetrain: error: ")


@pytest.mark.parametrize("command", [(), *((name,) for name in LIGHTNING_COMMANDS), ("bootstrap",)])
def test_help_answers_without_importing_anything_heavy(command: tuple[str, ...], tmp_path: Path) -> None:
    heavy = {"torch", "lightning", "transformers", "hivemind", "jsonargparse", "pyarrow"}
    script = (
        "import sys; from hivetrain.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        f"print('HEAVY', sorted({heavy!r} & set(sys.modules)), 'STATUS', status)"
    )
    done = run(sys.executable, "-c", script, *command, "--help", cwd=tmp_path)
    assert "usage: hivetrain" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY [] STATUS 0"


@pytest.mark.parametrize("program", [HIVETRAIN, (*HIVETRAIN, "fit"), MINER])
def test_help_takes_less_than_two_seconds_of_the_processor(program: tuple[str, ...], tmp_path: Path) -> None:
    before = os.times()
    done = run(*program, "--help", cwd=tmp_path)
    after = os.times()
    assert (done.returncode, done.stderr) == (0, "")
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


def test_help_lists_every_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    modules = {path.stem for path in (ROOT / "hivetrain" / "commands").glob("*.py")} - {"__init__"}
    assert modules
    for name in {*LIGHTNING_COMMANDS, *modules}:
        assert f"    {name.replace('_', '-')}" in listed


def test_one_file_serves_the_command_and_the_program_with_overrides(config: Path, tmp_path: Path) -> None:
    overrides = ["--stop.epochs=6", "--model.learning_rate", "0.02", "--trainer.max_epochs=9"]
    records = []
    for program in ((*HIVETRAIN, "fit", "-c"), (*MINER, "--config")):
        done = run(*program, str(config), *overrides, "--report.path=report.jsonl", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / "report.jsonl").open()]
        records.append([(line["event"], line["swarm_epoch"], line.get("loss")) for line in lines])
    assert records[0] == records[1]
    assert records[0][-1][:2] == ("end", 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.jsonl", "run.yaml"]  # and no litter


def test_the_other_commands_evaluate(config: Path, capsys) -> None:
    for command, metric in (("validate", "val/perplexity"), ("test", "test/perplexity"), ("predict", "")):
        assert main([command, "-c", str(config)]) == 0
        assert metric in capsys.readouterr().out


def test_the_configuration_is_kept_beside_the_logs_and_a_second_run_replaces_it(config: Path, tmp_path: Path) -> None:
    with_change(config, "trainer", "logger", value={"class_path": "CSVLogger"})
    with_change(config, "trainer", "logger", "init_args", value={"save_dir": str(tmp_path / "logs"), "version": "one"})
    for steps in (1, 2):
        assert main(["fit", "-c", str(config), f"--stop.epochs={steps}"]) == 0
    (kept,) = (tmp_path / "logs").rglob("config.yaml")
    assert yaml.safe_load(kept.read_text())["stop"]["init_args"] == {"epochs": 2}


def test_references_follow_overrides(config: Path, capsys) -> None:
    with_change(config, "data", "init_args", value={"block_size": "${trainer.max_epochs}"})
    assert main(["fit", "-c", str(config), "--stop.epochs=1"]) == 0
    assert main(["fit", "-c", str(config), "--trainer.max_epochs=40"]) == 2  # a block of 40 is beyond the context
    assert "block_size is 40" in capsys.readouterr().err


def test_a_mistake_is_all_that_reaches_stderr(config: Path, tmp_path: Path) -> None:
    done = run(*MINER, "-c", str(config), "--model.learning_rat=1", cwd=tmp_path)
    assert done.returncode == 2
    place = "--model.learning_rat is not an option of hivetrain.model.CausalLM"
    assert done.stderr == f"miner.py: error: {place}; did you mean 'learning_rate'?\n"


def test_the_whole_configuration_can_be_printed(config: Path, capsys) -> None:
    assert main(["fit", "-c", str(config), "--trainer.max_epochs=5", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_epochs"] == 5
    assert printed["model"]["init_args"]["learning_rate"] == 0.01


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("trainer", "max_stepz"), 5,
         "trainer.max_stepz is not an option of lightning.pytorch.Trainer; did you mean 'max_steps'?"),
        (("model", "learning_rat"), 0.1,
         "model.learning_rat is not an option of hivetrain.model.CausalLM; did you mean 'learning_rate'?"),
        (("model", "config", "n_layre"), 1, "did you mean 'n_layer'?"),
        (("modell",), {"vocab_size": 1}, "modell is not an option; did you mean 'model'?"),
        (("stop",), {"epoch": 3},
         "stop.epoch is not an option of hivetrain.callbacks.StopAtSwarmEpoch; did you mean 'epochs'?"),
        (("trainer", "callbacks"), [{"class_path": "ModelCheckpoint", "init_args": {"moniter": "x"}}],
         "trainer.callbacks[0].init_args.moniter is not an option of ModelCheckpoint; did you mean 'monitor'?"),
        (("trainer", "callbacks"), [{"class_path": "ModelCheckpoint", "moniter": "x"}], "trainer.callbacks[0].moniter"),
        (("trainer", "callbacks"), [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": "x"}}],
         "trainer.callbacks[0].init_args.every_n_train_steps: expected int or null, got 'x'"),
        (("trainer", "callbacks"), [{"class_path": "NoSuchThing"}], "NoSuchThing"),
        (("model", "learning_rate"), "fast", "model.learning_rate: expected float, got 'fast'"),
        (("trainer", "max_steps"), "many", "trainer.max_steps: expected int, got 'many'"),
        (("data",), {"class_path": "no.such.Module"}, "no.such.Module"),
        (("trainer", "max_steps"), "${no.such}", "trainer.max_steps"),
        (("trainer", "strategy"), "nonsense", "nonsense"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_line_that_names_the_key(config: Path, capsys, keys, value, words: str) -> None:
    with_change(config, *keys, value=value)
    assert words in refusal(capsys, "fit", "-c", str(config))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model.learning_rat", "1"), "--model.learning_rat is not an option of hivetrain.model.CausalLM"),
        (("--data.blocksize=1",),
         "--data.blocksize is not an option of toy_data.CountingData; did you mean 'block_size'?"),
        (("--trainr.max_steps=1",), "--trainr is not an option; did you mean 'trainer'?"),
        (("--stop.epochs=x",), "--stop.epochs: expected int, got 'x'"),
        (("--stop.epochs=0",), "stop.epochs must be at least 1"),
        (("-c", "absent.yaml"), "absent.yaml"),
        (("--ckpt_path", "absent.ckpt"), "absent.ckpt"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(config: Path, capsys, arguments, words: str) -> None:
    assert words in refusal(capsys, "fit", "-c", str(config), *arguments)


def test_an_unknown_command_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fitt"])
    assert end.value.code == 2
    assert "fitt" in capsys.readouterr().err


def test_a_message_that_is_not_understood_is_passed_on_in_one_line() -> None:
    assert describe("something\n  unheard of", []) == "something unheard of"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_fit_in_time_without_a_traceback(
    config: Path, tmp_path: Path, number: int, status: int
) -> None:
    process = start(*MINER, "-c", str(config), "--trainer.max_epochs=-1", "--report.path=report.jsonl", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        report = tmp_path / "report.jsonl"
        while not report.exists() or report.read_text().count("\n") < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=10)
        assert time.monotonic() - sent < 10
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == status
    assert "Traceback" not in errors


STUCK = """
import subprocess, sys, time
from hivetrain import ending
ending.ENDING_S = 0.5
with ending.orderly_end():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    finally:
        time.sleep(600)
"""


def test_a_clean_up_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    process = start(sys.executable, "-c", STUCK, cwd=tmp_path)
    child = int(process.stdout.readline())
    process.terminate()
    assert process.wait(10) == 143
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_weights_and_biases_log_offline(config: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {"project": "hivetrain", "offline": True, "save_dir": str(tmp_path / "logs")}
    with_change(config, "trainer", "logger", value={"class_path": "WandbLogger", "init_args": logger})
    with_change(config, "trainer", "log_every_n_steps", value=1)
    done = run(*HIVETRAIN, "fit", "-c", str(config), "--stop.epochs=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "logs").rglob("run-*.wandb")
    assert b"train/loss" in record.read_bytes()
