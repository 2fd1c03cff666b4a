"""Runs the demo: starts the programs, shows their progress, waits for pay day, writes the summary.

Everything happens through the programs' public face: command lines, address files, the miners' reports, the validators'
state files, the ledger.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from hivetrain.demo import display
from hivetrain.demo.fleet import Fleet
from hivetrain.demo.options import Options
from hivetrain.demo.pay import pay_of, settled
from hivetrain.demo.reports import MinerLog, summarize
from hivetrain.demo.subnet import Subnet
from hivetrain.ending import orderly_end
from hivetrain.errors import UserError
from hivetrain.serving import write_atomically

_POLL_S = 0.5
_START_S = 90.0
_HERE = Path(__file__).parent
MINER_CONFIG, VALIDATOR_CONFIG = _HERE / "miner.yaml", _HERE / "validator.yaml"


class Economy:
    """One demo: its options, its programs and what is known of them."""

    def __init__(self, options: Options, fleet: Fleet, console: Console) -> None:
        self.options, self.fleet, self.console = options, fleet, console
        self.subnet = Subnet(options.out / "subnet")
        self.logs = [MinerLog(options.out / f"{name}.jsonl") for name in options.miner_names]
        self._began = time.monotonic()

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Starts ledger, bootstrap, validators and miners, in this order."""
        for log in self.logs:
            log.path.unlink(missing_ok=True)  # of an earlier run
        options = self.options
        self.subnet.create(options.miner_names, options.validator_names)
        self.chain = self._start_ledger()
        self.bootstrap = self._start_bootstrap()
        self.console.print(f"bootstrap server at {self.bootstrap}; ledger at {self.chain}; logs in {options.out}/logs")
        for name in options.validator_names:
            self.fleet.start(name, self._validator_arguments(name))
        for slot, name in enumerate(options.miner_names):
            self.fleet.start(name, self._miner_arguments(name, slot))
        if options.dashboard:
            self.console.print(f"dashboard: {self._start_dashboard()}")
        for kind, names in (("miners", options.miner_names), ("validators", options.validator_names)):
            if names:
                pids = ", ".join(f"{name} is pid {self.fleet.pid(name)}" for name in names)
                self.console.print(f"{len(names)} {kind} are starting: {pids}")

    def follow(self) -> None:
        """Shows progress until all miners have ended, or time is up."""
        shown, miners = -1, self.options.miner_names
        live_display = Live(console=self.console, refresh_per_second=4, transient=True)
        with live_display if self.console.is_terminal else _nothing() as live:
            while any(self.fleet.exit_code(name) is None for name in miners) and not self._is_late():
                time.sleep(_POLL_S)
                for log in self.logs:
                    log.read()
                last = max((epoch for log in self.logs for epoch in log.epochs), default=-1)
                if live is not None:
                    live.update(display.table(self.fleet, miners, self.logs, self.options))
                elif last > shown:
                    self.console.print(display.line(self.logs, last, self.options))
                shown = max(shown, last)
        for log in self.logs:
            log.read()

    def settle(self) -> None:
        """Waits for the chain's epoch in which the last work is paid."""
        if not self.options.validators:
            return
        view = self.subnet.snapshot()
        due = view.block + self.options.rules.reveal_blocks
        pay_day = view.next_epoch + max(0, -(-(due - view.next_epoch + 2) // view.tempo)) * view.tempo
        self.console.print(f"training is over at block {view.block}; the last work is paid at block {pay_day}")
        while self.subnet.snapshot().block <= pay_day and not self._is_late():
            if all(self.fleet.exit_code(name) is not None for name in self.options.validator_names):
                return
            time.sleep(_POLL_S)

    def summary(self) -> dict[str, Any]:
        """What happened, from the miners' reports, the validators' state files and the ledger."""
        options = self.options
        exit_codes = [self.fleet.exit_code(name) for name in options.miner_names]
        for name in (*options.miner_names, *options.validator_names):
            code = self.fleet.exit_code(name)
            if code != 0 and (code is not None or name in options.miner_names):
                self.console.print(f"{name} did not finish (exit code {code}):\n{self.fleet.log_tail(name)}")
        honest = [options.cheat_of(name) is None for name in options.miner_names]
        summary = summarize(self.logs, exit_codes, self.wall_s, honest)
        for name, miner in zip(options.miner_names, summary["miners"], strict=True):
            miner |= {"name": name, "hotkey": self.subnet.hotkeys[name], "cheat": options.cheat_of(name)}
        return summary | pay_of(self.subnet, options, summary["miners"])

    def _start_ledger(self) -> str:
        file = self.options.out / "ledger.address"
        file.unlink(missing_ok=True)
        arguments = ["ledger", "--serve", str(self.subnet.file), "--port", "0", "--address-file", str(file)]
        self.fleet.start("ledger", arguments)
        return self._wait_for("ledger", file, lambda text: text)

    def _start_bootstrap(self) -> str:
        file = self.options.out / "bootstrap.json"
        file.unlink(missing_ok=True)
        identity = str(file.with_suffix(".id"))
        arguments = ["bootstrap", "--port", "0", "--address-file", str(file), "--identity-path", identity]
        self.fleet.start("bootstrap", arguments)
        return self._wait_for("bootstrap", file, lambda text: str(json.loads(text)["url"]))

    def _start_dashboard(self) -> str:
        file = self.options.out / "dashboard.address"
        file.unlink(missing_ok=True)
        arguments = [
            *("dashboard", "--run-id", self._run_id, "--initial-peers", self.bootstrap, "--chain", self.chain),
            *("--port", "0", "--interval", "1", "--db", str(self.options.out / "dashboard.sqlite3")),
            *("--address-file", str(file)),
        ]
        self.fleet.start("dashboard", arguments)
        return self._wait_for("dashboard", file, lambda text: text.strip())

    def _wait_for(self, name: str, file: Path, parse: Callable[[str], str]) -> str:
        deadline = time.monotonic() + _START_S
        while not file.exists():
            if self.fleet.exit_code(name) is not None or time.monotonic() > deadline:
                raise UserError(f"the {name} did not start:\n{self.fleet.log_tail(name)}")
            time.sleep(0.1)
        return parse(file.read_text())

    def _miner_arguments(self, name: str, slot: int) -> list[str]:
        settings = {
            "seed_everything": self.options.seed,
            "trainer.strategy.run_id": self._run_id,
            "trainer.strategy.initial_peers": self.bootstrap,
            "data.seed": self.options.seed,
            "data.slot": slot,
            "stop.epochs": self.options.swarm_epochs,
            "report": "hivetrain.callbacks.MinerReport",
            "report.path": self.options.out / f"{name}.jsonl",
            **({"status": "hivetrain.callbacks.SwarmStatus"} if self.options.dashboard else {}),
            **(self._contribution_settings(name) if self.options.validators else {}),
        }
        return ["fit", "--config", str(MINER_CONFIG), *(f"--{key}={value}" for key, value in settings.items())]

    def _contribution_settings(self, name: str) -> dict[str, Any]:
        """What makes a miner commit to its work; without validators nobody would look at it."""
        cheat = self.options.cheat_of(name)
        publisher = "hivetrain.demo.cheats.CheatingPublisher" if cheat else "hivetrain.callbacks.ContributionPublisher"
        return {
            "contribute": publisher,
            **({"contribute.kind": cheat} if cheat else {}),
            "contribute.chain": self.chain,
            **{f"contribute.{key}": value for key, value in self.subnet.key_arguments(name).items()},
            "contribute.rules": json.dumps(vars(self.options.rules)),
        }

    def _validator_arguments(self, name: str) -> list[str]:
        settings = {
            "run.run_id": self._run_id,
            "run.initial_peers": self.bootstrap,
            "model.init_args.total_epochs": self.options.swarm_epochs,
            "data.seed": self.options.seed,
            "chain.address": self.chain,
            **{f"chain.{key}": value for key, value in self.subnet.key_arguments(name).items()},
            **{f"rules.{key}": value for key, value in vars(self.options.rules).items()},
            "state": self.subnet.state_file(name),
        }
        return ["score", "--config", str(VALIDATOR_CONFIG), *(f"--{key}={value}" for key, value in settings.items())]

    @property
    def _run_id(self) -> str:
        return f"demo-{os.getpid()}"

    def _is_late(self) -> bool:
        late = self.wall_s > self.options.timeout_s
        if late:
            self.console.print(f"time is up after {self.options.timeout_s:.0f} s; stopping what still runs")
        return late


def run_demo(options: Options, console: Console) -> int:
    """Runs the demo. Returns the exit status: 0 if every miner that lived to the end holds the same params and, where
    there are validators, they agree and no cheat is paid."""
    if options.miners < 1 or options.swarm_epochs < 1 or options.validators < 0:
        raise UserError("--miners and --swarm-epochs must be at least 1, --validators at least 0")
    if len(options.cheats) >= options.miners:
        raise UserError("at least one miner must be honest: raise --miners or give fewer --cheats")
    if options.cheats and not options.validators:
        raise UserError("without validators nobody catches a cheat: raise --validators, or give --cheats none")
    with orderly_end(), Fleet(options.out / "logs") as fleet:
        economy = Economy(options, fleet, console)
        economy.start()
        economy.follow()
        economy.settle()
        summary = economy.summary()
    economy.subnet.forget_params()
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    plotted = display.plot(economy.logs, summary, options.out / "loss.png")
    display.print_summary(summary, options.out, plotted, console)
    learned = summary["digests_equal"] and summary["swarm_epochs"] >= options.swarm_epochs
    return 0 if learned and (not options.validators or settled(summary)) else 1


@contextmanager
def _nothing() -> Iterator[None]:
    yield None
