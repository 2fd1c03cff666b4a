"""The program: its configuration, its errors, its end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from small_economy import TEMPO, T

from hivetrain.chain.base import Rules
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.cli import main
from hivetrain.commands.score import parse
from hivetrain.contribution.rules import AuditRules
from hivetrain.keys import Wallet
from hivetrain.model import CausalLM
from hivetrain.swarm import start_dht, visible_maddrs

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "validator.yaml"
SMALL = ["--model.config.n_layer=1", "--model.config.n_embd=8", "--model.config.n_head=1"]


def test_the_shipped_configuration_is_that_of_the_miners() -> None:
    config = parse(["--config", str(CONFIG), *SMALL])
    assert isinstance(config.model, CausalLM)
    assert config.rules == AuditRules()
    assert config.data.block_size == config.model.lm.config.n_positions == 1024
    ours, theirs = (yaml.safe_load((ROOT / "configs" / name).read_text()) for name in ("validator.yaml", "miner.yaml"))
    assert ours["model"] == theirs["model"]
    del theirs["data"]["init_args"]["num_workers"]
    assert ours["data"] == theirs["data"]
    strategy = theirs["trainer"]["strategy"]["init_args"]
    assert (config.run.run_id, config.run.target_batch_size) == (strategy["run_id"], strategy["target_batch_size"])
    assert config.run.gradient_clip_val == theirs["trainer"]["gradient_clip_val"]


def test_flags_override_the_configuration() -> None:
    config = parse(["-c", str(CONFIG), *SMALL, "--run.run_id=other", "--scoring.alpha", "0.25", "--rules.leaves=3"])
    assert (config.run.run_id, config.scoring.alpha, config.rules.leaves) == ("other", 0.25, 3)


def test_help_answers_at_once(capsys) -> None:
    started = time.monotonic()
    program = [sys.executable, str(ROOT / "validators" / "validator.py")]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 10
    assert done.returncode == 0
    assert "--scoring.alpha" in done.stdout
    imported = "import sys; from hivetrain.cli import main; main(['score', '-h']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scoring.alpha=3"], "scoring.alpha must lie above 0"),
        (["--scoring.aplha=3"], "--scoring.aplha"),
        (["--rules.probability=3"], "probability must lie between 0 and 1"),
        (["--run.target_batch_size=many"], "run.target_batch_size: expected int"),
        (["--data.blok_size=3"], "did you mean 'block_size'?"),
        (["--model.dropout=0.1"], "set dropout to 0"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--chain.wallet=nobody"], "create one with: hivetrain keys new"),
        (["--chain.address=there is none.db"], "create it with: hivetrain ledger create"),
        (["--run.initial_peers=[]"], "set run.initial_peers"),
    ],
)
def test_a_mistake_is_one_clear_line(place, arguments, message, capsys) -> None:
    assert main(["score", *place.arguments, *SMALL, *arguments], program="validator.py") == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("validator.py: error:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_an_unregistered_hotkey_is_refused(place, capsys) -> None:
    Wallet("other", "default", place.wallets).create_hotkey()
    assert main(["score", *place.arguments, *SMALL, "--chain.wallet=other"]) == 2
    assert "is not registered" in capsys.readouterr().err


class Place:
    """A ledger, a wallet that is registered on it, and the flags that name them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.ledger, self.wallets = directory, directory / "ledger.db", str(directory / "wallets")
        Ledger.create(self.ledger, Rules(tempo=TEMPO, block_time_s=1.0))
        wallet = Wallet("validator", "default", self.wallets)
        wallet.create_hotkey()
        with LocalChain(self.ledger, wallet) as chain:
            chain.register(T)
        self.arguments = [
            f"--state={directory / 'validator.db'}",
            f"--chain.address={self.ledger}",
            "--chain.wallet=validator",
            f"--chain.wallet_path={self.wallets}",
            "--chain.timeout_s=3",
            "--data.n_slots=8",
        ]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_it_in_time_with_all_its_processes_and_it_starts_again_at_once(place, signum) -> None:
    dht = start_dht([])
    program = [sys.executable, str(ROOT / "validators" / "validator.py"), *place.arguments, *SMALL]
    program.append(f"--run.initial_peers={visible_maddrs(dht)[0]}")
    try:
        for ending in (signal.SIGKILL, signum):
            log = place.directory / f"{ending.name}.log"
            with log.open("w") as file:
                validator = subprocess.Popen(program, stderr=file, stdout=file)
            wait_until(lambda log=log: "round cut short" in log.read_text(), validator, log)  # nobody trains here
            children = psutil.Process(validator.pid).children(recursive=True)
            assert children, "its DHT runs in processes of its own"
            validator.send_signal(ending)
            started = time.monotonic()
            code = validator.wait(15)
            assert time.monotonic() - started < 10
            assert code == (-ending if ending is signal.SIGKILL else 128 + ending), log.read_text()
            _, alive = psutil.wait_procs(children, timeout=5)
            assert not alive
    finally:
        dht.shutdown()


def wait_until(condition, process, log, timeout_s=120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
