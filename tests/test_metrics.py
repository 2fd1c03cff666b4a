"""Prometheus metrics: conventions, bounded labels, what each program serves; Grafana asks for what there is."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from lightning.pytorch import Callback
from prometheus_client.parser import text_string_to_metric_families
from test_callbacks import CountingData, PairedStrategy, model, trainer

from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.callbacks import EnergyUse, SwarmMetrics
from hivetrain.callbacks.work_counts import WorkCounts
from hivetrain.contribution.audit import Verdict
from hivetrain.errors import UserError
from hivetrain.metrics import (
    BootstrapMetrics,
    BootstrapState,
    CountedRequests,
    DashboardMetrics,
    MetricsServer,
    MinerMetrics,
    MinerState,
    ValidatorMetrics,
    new_registry,
    request_histogram,
)

ROOT = Path(__file__).parents[1]
PROGRAMS = ("miner", "bootstrap", "validator", "dashboard")
ROUNDS = (
    RoundReport(0, Outcome.AVERAGED, 3, 3, 1.0, 24, 8, 0.2, 1.5, 1000, 2000),
    RoundReport(1, Outcome.NO_GROUP, 1, 3, matchmaking_s=5.0),
    RoundReport(1, Outcome.INCOMPLETE, 3, 3, 0.5, 0, 8, 0.3, 4.0, 10, 20),
)


def full_state(rounds=ROUNDS):
    counts = {name.removeprefix("chain/"): value for name, value in WorkCounts(audits_drawn=4).metrics().items()}
    return MinerState(
        identity={"run_id": "r", "peer_id": "Qm", "uid": "3"},
        swarm_epoch=7,
        loss=2.5,
        tokens=4096,
        tokens_per_second=100.0,
        peers=3,
        swarm_samples=16,
        target_samples=24,
        samples={"contributed": 16, "dropped": 8, "skipped": 0},
        rounds=rounds,
        counts=counts,
        joules={"cpu": 12.0, "gpu": 30.0},
    )


def registry_of(program):
    """The registry of a program that has done a bit of everything."""
    registry = new_registry(program)
    if program == "miner":
        MinerMetrics(registry, full_state)
    elif program == "bootstrap":
        states = {"linked": 1, "split": 0, "silent": 1, "unknown": 0}
        BootstrapMetrics(registry, lambda: BootstrapState("Qm", True, 4, states))
        request_histogram("bootstrap", registry).labels("/health", "2xx").observe(0.01)
    elif program == "validator":
        metrics = ValidatorMetrics(registry, Verdict, ["set", "failed"])
        metrics.began("r", "5F", 0)
        metrics.polled(100, 7, 2, 0.5)
        metrics.audited(3.0)
        metrics.judged(Verdict.PASSED, 24)
        metrics.failed("chain")
        metrics.weighed("set", 3)
    else:
        metrics = DashboardMetrics(registry)
        metrics.requests.labels("/", "2xx").observe(0.01)
        with metrics.viewer(), metrics.reading("dht"):
            metrics.saw(7, 3)
        metrics.stored(4096)
    return registry


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def samples_at(url):
    families = text_string_to_metric_families(fetch(url))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value for family in families for sample in family.samples
    }


def names_of(program):
    return {sample.name for metric in registry_of(program).collect() for sample in metric.samples}


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_and_units_keep_prometheus_conventions(program):
    for metric in registry_of(program).collect():
        assert metric.name.startswith((f"hivetrain_{program}", "hivetrain_build", "process_"))
        assert metric.documentation
        if metric.name.startswith("process_"):
            continue
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert not re.search(r"_(s|ms|milliseconds|minutes|kb|mb|percent|number|count)$", metric.name)
        for sample in metric.samples:
            if metric.type == "counter":
                assert sample.name.endswith(("_total", "_created"))
            if metric.type == "histogram":
                assert metric.name.endswith(("_seconds", "_bytes"))
            if metric.type == "info":
                assert sample.name.endswith("_info")


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_label_is_anothers_name(program):
    """Only info metrics, one series each, name a peer: their number must not grow with the swarm."""
    for metric in registry_of(program).collect():
        if metric.type == "info":
            assert len(metric.samples) == 1
            continue
        for sample in metric.samples:
            assert set(sample.labels) <= {
                "le", "outcome", "direction", "fate", "component", "verdict", "status", "source", "route", "state",
                "sums",
            }  # fmt: skip


def test_a_miners_state_as_metrics():
    registry = registry_of("miner")
    value = registry.get_sample_value
    assert value("hivetrain_miner_info", {"run_id": "r", "peer_id": "Qm", "uid": "3"}) == 1
    assert value("hivetrain_miner_swarm_epoch") == 7
    assert value("hivetrain_miner_loss") == 2.5
    assert value("hivetrain_miner_tokens_total") == 4096
    assert value("hivetrain_miner_samples_total", {"fate": "dropped"}) == 8
    assert value("hivetrain_miner_rounds_total", {"outcome": "averaged"}) == 1
    assert value("hivetrain_miner_rounds_total", {"outcome": "disagreed"}) == 0
    assert value("hivetrain_miner_exchanged_bytes_total", {"direction": "received"}) == 2020
    assert value("hivetrain_miner_exchange_seconds_count") == 2  # where nobody was found nothing was exchanged
    assert value("hivetrain_miner_exchange_seconds_sum") == 5.5
    assert value("hivetrain_miner_matchmaking_seconds_count") == 3
    assert value("hivetrain_miner_received_ratio") == 0.5
    assert value("hivetrain_miner_audits_drawn_total") == 4
    assert value("hivetrain_miner_energy_joules_total", {"component": "gpu"}) == 30


def test_rounds_are_counted_once_however_often_somebody_asks():
    rounds = list(ROUNDS)
    registry = new_registry("miner")
    MinerMetrics(registry, lambda: full_state(tuple(rounds)))
    counted = [registry.get_sample_value("hivetrain_miner_matchmaking_seconds_count") for _ in range(3)]
    rounds.append(ROUNDS[0])
    counted.append(registry.get_sample_value("hivetrain_miner_matchmaking_seconds_count"))
    assert counted == [3, 3, 3, 4]


def test_what_there_is_not_is_left_out_and_not_zero():
    registry = new_registry("miner")
    MinerMetrics(registry, lambda: MinerState({}, 0, None, 0, None, joules={}))
    assert registry.get_sample_value("hivetrain_miner_loss") is None
    assert registry.get_sample_value("hivetrain_miner_peers") is None
    assert registry.get_sample_value("hivetrain_miner_energy_available") == 0
    assert registry.get_sample_value("hivetrain_miner_energy_joules_total", {"component": "cpu"}) is None


def test_every_count_of_the_incentive_network_is_a_counter():
    for name in WorkCounts().metrics():
        assert f"hivetrain_miner_{name.removeprefix('chain/')}_total" in names_of("miner")


def test_the_server_serves_and_ends_in_time():
    server = MetricsServer(0, "127.0.0.1", registry_of("validator"))
    with server:
        port = server.port
        assert samples_at(server.url)["hivetrain_validator_samples_total", ("verdict", "passed")] == 24
        with closing(socket.create_connection(("127.0.0.1", port))):  # a client that says nothing
            began = time.monotonic()
            server.close()
            assert time.monotonic() - began < 4
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)
    server.close()


def test_a_port_that_is_taken_is_one_clear_line():
    with MetricsServer(0, "127.0.0.1", new_registry("miner")) as first:
        second = MetricsServer(first.port, "127.0.0.1", new_registry("miner"))
        for attempt in (second.check, second.start):
            with pytest.raises(UserError, match=f"port {first.port}: Address already in use; choose another port"):
                attempt()


@pytest.mark.parametrize(("port", "host"), [(70000, "127.0.0.1"), (0, "192.0.2.1"), (0, "no.such.host.invalid")])
def test_an_address_that_cannot_be_had_is_refused(port, host):
    with pytest.raises(UserError, match="cannot serve metrics"):
        MetricsServer(port, host, new_registry("miner")).check()


def test_registries_of_two_programs_are_apart():
    one, another = new_registry("miner"), new_registry("miner")
    MinerMetrics(one, full_state)
    MinerMetrics(another, full_state)
    assert one.get_sample_value("hivetrain_miner_tokens_total") == 4096


def test_requests_are_counted_by_route_and_never_by_path():
    app = FastAPI()

    @app.get("/miners/{hotkey}")
    def miner(hotkey: str) -> str:
        if hotkey == "bad":
            raise RuntimeError(hotkey)
        return hotkey

    registry = new_registry("dashboard")
    app.add_middleware(CountedRequests, histogram=DashboardMetrics(registry).requests)
    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/miners/a", "/miners/b", "/miners/bad", "/nothing/1", "/nothing/2"):
        client.get(path)

    def count(route, status):
        return registry.get_sample_value(
            "hivetrain_dashboard_request_seconds_count", {"route": route, "status": status}
        )

    assert count("/miners/{hotkey}", "2xx") == 2
    assert count("/miners/{hotkey}", "5xx") == 1
    assert count("other", "4xx") == 2


def test_a_look_of_the_dashboard_that_fails_counts_as_a_failure_and_goes_on():
    registry = new_registry("dashboard")
    metrics = DashboardMetrics(registry)
    with pytest.raises(TimeoutError), metrics.reading("chain"):
        raise TimeoutError
    with metrics.reading("dht"):
        pass
    assert registry.get_sample_value("hivetrain_dashboard_read_failures_total", {"source": "chain"}) == 1
    assert registry.get_sample_value("hivetrain_dashboard_read_seconds_count", {"source": "chain"}) == 0
    assert registry.get_sample_value("hivetrain_dashboard_read_seconds_count", {"source": "dht"}) == 1


@dataclass
class Paid(Callback):
    counts = WorkCounts(contributions_published=2)
    uid = 5


class Metered(EnergyUse):
    """A machine that has used 50 J."""

    joules = {"cpu": 50.0}


class CountedStrategy(PairedStrategy):
    run_id = "toy"
    samples_contributed, samples_dropped, samples_skipped = 12, 3, 1

    def optimizer_step(self, optimizer, closure, model=None, **kwargs):
        loss = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.rounds = [ROUNDS[0]] * (self.microbatches // 2)
        return loss


class Scrape(Callback):
    """Asks for the metrics while training, as Prometheus would, from another thread."""

    def __init__(self, metrics):
        self.metrics, self.seen, self.url = metrics, {}, None

    def on_train_batch_end(self, *_):
        def ask():
            self.seen = samples_at(self.metrics.url)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(10)
        self.url = self.metrics.url


def test_a_miner_that_trains_serves_what_it_does():
    metrics = SwarmMetrics(port=0)
    scrape = Scrape(metrics)
    running = trainer(metrics, Paid(), Metered(), scrape, strategy=CountedStrategy(), max_steps=6)
    running.fit(model(), datamodule=CountingData())
    seen = scrape.seen
    assert seen["hivetrain_miner_info", ("peer_id", "QmPeer"), ("run_id", "toy"), ("uid", "5")] == 1
    assert seen["hivetrain_miner_swarm_epoch",] == 3
    assert seen["hivetrain_miner_tokens_total",] == 6 * 4 * 16
    assert seen["hivetrain_miner_tokens_per_second",] > 0
    assert seen["hivetrain_miner_loss",] == pytest.approx(float(running.callback_metrics["train/loss"]), rel=1e-5)
    assert seen["hivetrain_miner_peers",] == 2
    assert seen["hivetrain_miner_samples_total", ("fate", "skipped")] == 1
    assert seen["hivetrain_miner_rounds_total", ("outcome", "averaged")] == 3
    assert seen["hivetrain_miner_contributions_published_total",] == 2
    assert seen["hivetrain_miner_energy_joules_total", ("component", "cpu")] == 50
    assert metrics.url is None
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(scrape.url, timeout=2)


def test_outside_a_swarm_a_miner_has_the_metrics_that_make_sense():
    metrics = SwarmMetrics(port=0)
    scrape = Scrape(metrics)
    trainer(metrics, scrape, paired=False, max_steps=2).fit(model(), datamodule=CountingData())
    assert scrape.seen["hivetrain_miner_swarm_epoch",] == 2
    assert ("hivetrain_miner_peers",) not in scrape.seen


def test_a_taken_port_is_found_out_before_training():
    with MetricsServer(0, "127.0.0.1", new_registry("miner")) as other:
        running = trainer(SwarmMetrics(port=other.port), paired=False, max_steps=2)
        with pytest.raises(UserError, match=f"port {other.port}"):
            running.fit(model(), datamodule=CountingData())
        assert running.global_step == 0


def test_a_miner_that_fails_stops_serving():
    metrics = SwarmMetrics(port=0)

    class Fails(Callback):
        def on_train_batch_end(self, *_):
            self.url = metrics.url
            raise RuntimeError("lost")

    fails = Fails()
    with pytest.raises(RuntimeError, match="lost"):
        trainer(metrics, fails, paired=False, max_steps=2).fit(model(), datamodule=CountingData())
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(fails.url, timeout=2)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.timeout(120)
def test_a_bootstrap_serves_its_metrics_and_counts_its_requests(tmp_path):
    port, address = free_port(), tmp_path / "address.json"
    options = ["--port", "0", "--identity-path", str(tmp_path / "id"), "--address-file", str(address)]
    command = [sys.executable, "-m", "hivetrain.cli", "bootstrap", *options, "--metrics-port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        try:
            deadline = time.monotonic() + 60
            while not address.exists():
                assert program.poll() is None, program.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            where = json.loads(address.read_text())
            fetch(f"{where['url']}/return_dht_address")
            seen = samples_at(f"http://127.0.0.1:{port}/metrics")
        finally:
            program.terminate()
            program.communicate(timeout=30)
    assert program.returncode == 0
    assert seen["hivetrain_bootstrap_info", ("peer_id", where["peer_id"])] == 1
    assert seen["hivetrain_bootstrap_serving",] == 1
    assert seen["hivetrain_bootstrap_dht_peers",] == 0
    counted = ("hivetrain_bootstrap_request_seconds_count", ("route", "/return_dht_address"), ("status", "2xx"))
    assert seen[counted] == 1


def queries():
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


def unknown_names(expression, known):
    asked = set(re.findall(r"\b(?:hivetrain|process)_[a-z0-9_]+", expression))
    assert asked, expression
    return asked - known


def test_grafana_asks_only_for_what_the_programs_expose():
    known = set().union(*map(names_of, PROGRAMS))
    assert len(queries()) > 20
    assert {title: missing for title, asked in queries() if (missing := unknown_names(asked, known))} == {}
    assert unknown_names("rate(hivetrain_miner_no_such_total[5m])", known) == {"hivetrain_miner_no_such_total"}


def test_grafanas_label_filters_name_labels_and_values_that_exist():
    seen = {}
    for program in PROGRAMS:
        for metric in registry_of(program).collect():
            for sample in metric.samples:
                for label, value in sample.labels.items():
                    seen.setdefault((sample.name, label), set()).add(value)
    for _, expression in queries():
        for name, filters in re.findall(r"((?:hivetrain|process)_[a-z0-9_]+)\{([^}]*)\}", expression):
            for label, value in re.findall(r'(\w+)=~?"([^"]*)"', filters):
                if label != "instance":
                    assert set(value.split("|")) <= seen[name, label]


def test_grafanas_panels_do_not_overlap():
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_documentation_names_every_metric():
    page = (ROOT / "docs" / "metrics.md").read_text()
    for program in PROGRAMS:
        for metric in registry_of(program).collect():
            if metric.name.startswith("hivetrain_"):
                suffix = {"counter": "_total", "info": "_info"}.get(metric.type, "")
                assert f"`{metric.name}{suffix}" in page, metric.name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_of_monitoring_measures_its_parts():
    command = [sys.executable, "benchmarks/monitoring.py", "--pairs", "1", "--microbatches", "4"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines() if line.startswith("|")]
    shares = {row[0]: float(row[1].rstrip("%")) for row in rows if len(row) == 2 and row[1].endswith("%")}
    assert len(shares) == 5
    assert shares["hooks, on the training thread"] > 0
    assert shares["sum"] == pytest.approx(sum(shares.values()) - shares["sum"], abs=0.01)
