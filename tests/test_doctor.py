"""The doctor against real servers, ledgers and configurations."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from bootstrap_server import bootstrap

from hivetrain.cli import main
from hivetrain.doctor import machine, network, sources
from hivetrain.doctor.checks import checks_of
from hivetrain.doctor.plan import Plan, get, read_plan
from hivetrain.doctor.report import Check, Status, fail, ok, run_checks
from hivetrain.errors import UserError
from hivetrain.keys import Wallet

ROOT = Path(__file__).parent.parent
CONFIG = {
    "trainer": {
        "precision": "bf16-mixed",
        "accelerator": "cpu",
        "strategy": {"class_path": "hivetrain.strategies.HivemindStrategy", "init_args": {"run_id": "mine"}},
    },
    "model": {"config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}, "vocab_size": 512},
    "data": {"batch_size": 2, "block_size": "${model.config.n_positions}"},
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HIVETRAIN_INITIAL_PEERS", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return str(path)


def by_name(output):
    return {check["check"]: check for check in json.loads(output)["checks"]}


def test_a_healthy_machine_passes_every_check_against_a_real_swarm(config, tmp_path):
    with bootstrap(tmp_path) as server:
        command = [sys.executable, "-m", "hivetrain.cli", "doctor", "-c", config, "--json", "--timeout=90"]
        command.append(f"trainer.strategy.initial_peers={server.url}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    found = by_name(done.stdout)
    assert done.returncode == 0, done.stdout
    assert {name for name, check in found.items() if check["status"] == "ok"} == {
        "ports", "bootstrap", "clock", "reachability", "python", "torch", "memory", "disk", "data",
    }  # fmt: skip
    assert found["swarm"]["status"] == "warn"
    assert "none of them trains run 'mine'" in found["swarm"]["detail"]
    assert found["chain"]["status"] == "skipped"
    assert "reached this machine at /ip4/127.0.0.1/tcp/" in found["reachability"]["detail"]


def test_two_silent_bootstraps_of_three_do_not_fail_a_healthy_miner(config, tmp_path):
    with ExitStack() as opened:
        silent = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        server = opened.enter_context(bootstrap(tmp_path))
        urls = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in silent]
        plan = read_plan([config], [f"trainer.strategy.initial_peers=[{', '.join([*urls, server.url])}]"])
        on_network, _ = checks_of(plan)
        found = {finding.check: finding for finding in run_checks([on_network], 30)}
    assert [finding.status for finding in found.values()] == ["ok", "warn", "ok", "ok", "warn"]
    assert f"{urls[0]}: no answer in time; {urls[1]}: no answer in time" in found["bootstrap"].detail
    assert "none of them trains run 'mine'" in found["swarm"].detail


def test_a_failure_is_told_with_what_to_do_and_status_1(config, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["doctor", "-c", config, "--timeout=20", f"trainer.strategy.host_maddrs=/ip4/127.0.0.1/tcp/{port}"]
        assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"FAIL    ports         /ip4/127.0.0.1/tcp/{port}: Address already in use" in printed
    assert "-> choose another port in host_maddrs, or end the program that has it" in printed


def test_a_configuration_that_cannot_be_read_is_status_2(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("a: [")
    assert main(["doctor", "-c", str(tmp_path / "absent.yaml")]) == 2
    assert main(["doctor", "-c", str(tmp_path / "bad.yaml")]) == 2
    assert main(["doctor", "nonsense"]) == 2
    assert "absent.yaml: No such file" in capsys.readouterr().err


def test_the_shipped_configurations_and_a_validators_are_understood(tmp_path):
    plan = read_plan([str(ROOT / "configs" / "miner.yaml")], ["trainer.strategy.initial_peers=[http://a, http://b]"])
    assert (plan.run_id, plan.precision, plan.identity_path) == ("refinedweb-gpt2", "bf16-mixed", "miner.id")
    assert network.bootstrap_urls(plan) == ["http://a", "http://b"]
    assert get(plan.data, "block_size") == 1024
    assert plan.checkpoint_dir == "checkpoints"
    validator = tmp_path / "validator.yaml"
    validator.write_text("run: {run_id: r, initial_peers: http://a}\nchain: {address: ledger.db, wallet: w}\n")
    plan = read_plan([str(validator)])
    assert (plan.is_validator, plan.run_id, plan.chain, plan.wallet.name) == (True, "r", "ledger.db", "w")
    assert plan.client_mode
    with pytest.raises(UserError, match="KEY=VALUE"):
        read_plan([], ["run_id"])


class Late(BaseHTTPRequestHandler):
    """A server whose clock is a minute behind."""

    answer: object = {"status": "ok"}

    def do_GET(self):
        self.send_response_only(200)
        self.send_header("Date", self.date_time_string(time.time() - 60))
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())

    def log_message(self, *_):
        pass


class Hostile(Late):
    """A server that would like to write on the terminal of whoever asks it."""

    answer = {"status": "ok\x1b[2J\nok      forged        all is well", "dht_peers": "9\r" * 10_000}


class NeverReaches(Late):
    """A server that can dial nobody back."""

    answer = {"status": "ok", "dht_peers": 3, "reachable": False}
    do_POST = Late.do_GET


@contextmanager
def serving(handler):
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_clock_that_is_a_minute_off_is_a_failure():
    with serving(Late) as url:
        finding = network.check_clock(Plan(initial_peers=url))
    assert finding.status == Status.FAIL
    assert "ahead of" in finding.detail
    assert "timedatectl" in finding.advice


def test_a_bootstrap_that_is_down_and_a_peer_nobody_can_dial_are_told():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    finding = network.check_bootstrap(Plan(initial_peers=[url]))
    assert (finding.status, "Connection refused" in finding.detail) == (Status.FAIL, True)
    far = Plan(initial_peers="http://198.51.100.1:8000")
    assert network.check_ports(far).status == Status.WARN
    assert network.check_reach(Plan(client_mode=True)).status == Status.SKIPPED


def test_a_peer_that_nobody_can_dial_fails_unless_a_relay_may_help(config):
    with serving(NeverReaches) as url:
        plan = read_plan([config], [f"trainer.strategy.initial_peers={url}"])
        finding = network.check_reach(plan)
        assert (finding.status, "use_auto_relay: true" in finding.advice) == (Status.FAIL, True)
        plan = read_plan([config], [f"trainer.strategy.initial_peers={url}", "trainer.strategy.use_auto_relay=true"])
        finding = network.check_reach(plan)
    assert (finding.status, "--relay" in finding.advice) == (Status.WARN, True)
    assert f"{url} cannot reach this machine on port" in finding.detail


def test_what_a_bootstrap_says_of_itself_cannot_reach_the_terminal():
    with serving(Hostile) as url:
        finding = network.check_bootstrap(Plan(initial_peers=url))
    assert finding.status == Status.FAIL
    assert finding.detail.startswith(f"{url} is ok\\x1b[2J\\nok      forged")
    assert finding.detail.isprintable()
    assert len(finding.detail) < 220


def test_no_finding_writes_more_than_its_line():
    def refused():
        raise RuntimeError("the node says \x1b[2J" + "a" * 10_000)

    checks = [Check("chain", lambda: fail("says \x1b[2J\nok", ""), 1, ""), Check("data", refused, 1, "")]
    for finding in run_checks([checks], 5):
        assert "says \\x1b[2J" in finding.detail
        assert finding.detail.isprintable()
        assert len(finding.detail) < 500


def test_keys_registration_and_permit_are_checked_on_a_real_ledger(tmp_path):
    ledger = str(tmp_path / "ledger.db")
    assert main(["ledger", "create", ledger]) == 0
    wallet = Wallet("w", "h", str(tmp_path))
    plan = Plan(chain=ledger, wallet=wallet)
    program, *advised = shlex.split(sources.check_keys(plan).advice)
    assert (program, main(advised)) == ("hivetrain", 0)
    assert sources.check_keys(plan).status == Status.OK
    os.chmod(wallet.hotkey_file, 0o644)
    assert sources.check_keys(plan).status == Status.WARN
    unknown = sources.check_chain(plan)
    assert (unknown.status, "is not registered" in unknown.detail) == (Status.FAIL, True)
    program, *advised = shlex.split(unknown.advice)
    assert (program, main(advised)) == ("hivetrain", 0)
    assert sources.check_chain(plan).status == Status.OK
    validator = sources.check_chain(Plan(is_validator=True, chain=ledger, wallet=wallet))
    assert (validator.status, "permit" in validator.detail) == (Status.FAIL, True)


def test_memory_and_disk_are_held_against_the_model(tmp_path):
    huge = {"config": {"n_layer": 96, "n_embd": 12288, "n_head": 96}}
    plan = Plan(model=huge, device="cpu", checkpoint_dir=str(tmp_path / "not" / "yet"), keep=1000)
    memory = machine.check_memory(plan)
    assert memory.status == Status.FAIL
    assert memory.detail.startswith("1745")  # 174.6 thousand million params, as GPT-3
    assert machine.check_disk(plan).status == Status.FAIL
    small = Plan(model={"config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}}, device="cpu")
    assert machine.check_memory(small).status == Status.OK


def test_what_lies_on_the_disk_already_is_not_demanded_again(tmp_path):
    cache, checkpoints = tmp_path / "cache", tmp_path / "checkpoints"
    cache.mkdir()
    checkpoints.mkdir()
    free = shutil.disk_usage(tmp_path).free
    model = {"config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}}
    size = machine._sizes(Plan(model=model))[0] * machine.CHECKPOINT_BYTES
    keep = int(1.5 * free / size)
    limit_mb = int(1.5 * free / 1e6)
    caching = Plan(data={"cache_dir": str(cache), "cache_limit_mb": limit_mb})
    keeping = Plan(model=model, checkpoint_dir=str(checkpoints), keep=keep)
    assert machine.check_disk(caching).status == Status.FAIL
    assert machine.check_disk(keeping).status == Status.FAIL
    with open(cache / "tokens.sqlite", "wb") as file:
        file.truncate(int(limit_mb * 1e6))  # takes no space
    with open(checkpoints / "epoch-00000001.ckpt", "wb") as file:
        file.truncate(keep * size)
    (checkpoints / "last.ckpt").symlink_to("epoch-00000001.ckpt")
    assert machine.check_disk(caching).status == Status.OK
    kept = machine.check_disk(keeping)
    assert kept.status == Status.OK
    assert f"{size / 1e9:.2f} GB more needed" in kept.detail  # the next one, written beside them


def test_what_shares_a_file_system_shares_its_space(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    model = {"config": {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}}
    size = machine._sizes(Plan(model=model))[0] * machine.CHECKPOINT_BYTES
    data = {"cache_dir": str(tmp_path / "cache"), "cache_limit_mb": int(0.6 * free / 1e6)}
    keeping = Plan(model=model, checkpoint_dir=str(tmp_path / "checkpoints"), keep=int(0.6 * free / size))
    assert machine.check_disk(Plan(data=data)).status == Status.OK
    assert machine.check_disk(keeping).status == Status.OK
    both = machine.check_disk(replace(keeping, data=data))
    assert both.status == Status.FAIL
    assert f"{tmp_path / 'checkpoints'} and {tmp_path / 'cache'} needs" in both.detail


def test_data_that_is_not_there_is_told():
    spec = {"corpus": {"class_path": "hivetrain.data.FolderCorpus", "init_args": {"path": "/nowhere"}}}
    (found,) = run_checks([[Check("data", lambda: sources.check_data(Plan(data=spec)), 10, "look")]], 10)
    assert found.status == Status.FAIL
    assert "/nowhere" in found.detail
    assert sources.check_data(Plan(data={})).status == Status.OK


def test_a_check_that_hangs_is_left_behind_and_the_others_run():
    forever = threading.Event()
    lanes = [[Check("hangs", forever.wait, 0.2, "wait no longer"), Check("next", lambda: ok("fine"), 1, "")]]
    started_at = time.monotonic()
    hung, after = run_checks(lanes, 5)
    assert time.monotonic() - started_at < 2
    assert (hung.status, hung.advice, after.status) == (Status.FAIL, "wait no longer", Status.OK)
    (late,) = run_checks([[Check("late", lambda: ok("fine"), 1, "")]], 0)
    assert "time was up" in late.detail
    forever.set()
