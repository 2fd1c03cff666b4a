"""Energy: joules by the machine's own counters, and nothing at all where there is none."""

import logging
import threading

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from test_callbacks import CountingData, model

from hivetrain.callbacks.energy import Counter, EnergyMeter, EnergyUse, find_counters
from hivetrain.errors import UserError

rapl = pytest.importorskip("zeus.device.cpu.rapl")
CPU = torch.device("cpu")


class Rapl:
    """A directory such as Linux shows: packages with sub-zones of their own."""

    def __init__(self, root):
        self.root = root

    def zone(self, path, name, microjoules, range_uj=1_000_000_000):
        zone = self.root / path
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        return zone / "energy_uj"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    def at(path):
        monkeypatch.setattr(rapl, "RAPL_DIR", str(path))
        monkeypatch.setattr(rapl, "CONTAINER_RAPL_DIR", str(tmp_path / "none"))
        rapl.rapl_is_available.cache_clear()
        return Rapl(path)

    yield at
    rapl.rapl_is_available.cache_clear()


def metered():
    counters, missing = find_counters(CPU)
    assert missing == []
    meter = EnergyMeter(counters)
    meter.start()
    return meter


def test_a_machine_without_counters_says_so_and_why(machine, tmp_path):
    machine(tmp_path / "no-such-directory")
    counters, missing = find_counters(CPU)
    assert counters == []
    assert len(missing) == 1
    assert "RAPL" in missing[0]


def test_this_machine_has_counters_or_says_why_not():
    counters, missing = find_counters(CPU)
    assert bool(counters) != bool(missing)
    assert all(counter.read() >= 0 for counter in counters)


def test_an_empty_directory_is_no_counter(machine, tmp_path):
    (tmp_path / "rapl").mkdir()
    machine(tmp_path / "rapl")
    assert find_counters(CPU)[0] == []


def test_a_counter_that_may_not_be_read_is_not_available(machine, tmp_path, monkeypatch):
    zone = machine(tmp_path / "rapl").zone("intel-rapl:0", "package-0", 0)

    def refuse(path, *arguments, **options):
        if str(path) == str(zone):
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments, **options)

    monkeypatch.setattr(rapl, "open", refuse, raising=False)  # root, who runs the tests here, may read everything
    counters, missing = find_counters(CPU)
    assert counters == []
    assert "ermission" in missing[0]


def test_packages_and_memory_are_added_up_and_cores_are_not_counted_twice(machine, tmp_path):
    files = machine(tmp_path / "rapl")
    packages = [files.zone(f"intel-rapl:{number}", f"package-{number}", 5_000_000) for number in range(2)]
    core = files.zone("intel-rapl:0/intel-rapl:0:0", "core", 1_000_000)
    dram = files.zone("intel-rapl:0/intel-rapl:0:1", "dram", 2_000_000)
    meter = metered()
    assert meter.read() == {"cpu": 0.0, "dram": 0.0}
    packages[0].write_text("6500000\n")
    packages[1].write_text("7000000\n")
    core.write_text("1400000\n")
    dram.write_text("2250000\n")
    assert meter.read() == pytest.approx({"cpu": 3.5, "dram": 0.25})


def test_a_counter_that_starts_again_at_zero_loses_nothing(machine, tmp_path):
    package = machine(tmp_path / "rapl").zone("intel-rapl:0", "package-0", 90_000_000, range_uj=100_000_000)
    meter = metered()
    package.write_text("4000000\n")
    assert meter.read() == pytest.approx({"cpu": 14.0})
    package.write_text("5000000\n")
    assert meter.read() == pytest.approx({"cpu": 15.0})


def test_a_counter_that_fails_takes_its_component_away_rather_than_counting_too_little(machine, tmp_path, caplog):
    files = machine(tmp_path / "rapl")
    package, other = (files.zone(f"intel-rapl:{number}", f"package-{number}", 0) for number in range(2))
    dram = files.zone("intel-rapl:0/intel-rapl:0:0", "dram", 0)
    meter = metered()
    package.unlink()
    other.write_text("1000000\n")
    dram.write_text("1000000\n")
    with caplog.at_level(logging.WARNING):
        assert meter.read() == pytest.approx({"dram": 1.0})
        assert meter.read() == pytest.approx({"dram": 1.0})
    assert len([record for record in caplog.records if "cpu" in record.getMessage()]) == 1


def test_no_process_is_left_behind_by_the_counters(machine, tmp_path):
    import psutil

    before = set(psutil.Process().children(recursive=True))
    machine(tmp_path / "rapl").zone("intel-rapl:0", "package-0", 0)
    metered().read()
    assert set(psutil.Process().children(recursive=True)) <= before


class Burn(Callback):
    """A machine that uses two joules for each microbatch."""

    def __init__(self, file):
        self.file, self.used = file, 0

    def on_train_batch_start(self, *_):
        self.used += 2_000_000
        self.file.write_text(f"{self.used}\n")


def fit(tmp_path, *callbacks):
    sink = CSVLogger(tmp_path, name="csv", version="0", flush_logs_every_n_steps=1)
    trainer = Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=sink, max_steps=5, log_every_n_steps=1,
        enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False, num_sanity_val_steps=0,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model(), datamodule=CountingData())


def test_a_fit_reports_joules_and_joules_per_million_tokens(machine, tmp_path, caplog):
    package = machine(tmp_path / "rapl").zone("intel-rapl:0", "package-0", 0)
    energy = EnergyUse(every_s=60)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Burn(package), energy)
    tokens = 5 * 4 * 16
    assert energy.energy_j == pytest.approx(10.0)
    assert energy.tokens == tokens
    assert energy.joules_per_million_tokens == pytest.approx(10.0 / tokens * 1e6)
    text = (tmp_path / "csv" / "0" / "metrics.csv").read_text()
    header, *rows = (line.split(",") for line in text.splitlines())
    column = header.index("self_reported/joules")
    assert [float(row[column]) for row in rows if row[column]] == pytest.approx([10.0])
    assert "self-reported" in caplog.text
    assert "energy" not in {thread.name for thread in threading.enumerate()}


def test_a_fit_without_counters_reports_nothing_instead_of_zero(machine, tmp_path, caplog):
    machine(tmp_path / "none")
    energy = EnergyUse()
    with caplog.at_level(logging.INFO):
        fit(tmp_path, energy)
    assert energy.joules == {}
    assert energy.energy_j is None
    assert energy.joules_per_million_tokens is None
    assert "energy is not available" in caplog.text
    header = (tmp_path / "csv" / "0" / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "joules" not in header


def test_a_fit_that_fails_stops_reading(machine, tmp_path):
    machine(tmp_path / "rapl").zone("intel-rapl:0", "package-0", 0)

    class Fails(Callback):
        def on_train_batch_end(self, *_):
            assert "energy" in {thread.name for thread in threading.enumerate()}
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fit(tmp_path, EnergyUse(every_s=60), Fails())
    assert "energy" not in {thread.name for thread in threading.enumerate()}


def test_counters_are_read_while_a_microbatch_takes_its_time():
    reads = threading.Semaphore(0)

    def read():
        reads.release()
        return 0.0

    energy = EnergyUse(every_s=0.001)
    energy._meter = EnergyMeter([Counter("cpu", read)])
    energy._meter.start()
    energy._reader = threading.Thread(target=energy._read_often)
    energy._reader.start()
    assert all(reads.acquire(timeout=10) for _ in range(5))
    energy._stop()


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zeus.device.cpu.rapl", None)
    with pytest.raises(UserError, match="hivetrain\\[energy\\]"):
        EnergyUse().setup(None, None, "fit")


@pytest.mark.parametrize("every_s", [0, -1, 61])
def test_an_interval_in_which_counters_could_start_again_twice_is_refused(every_s):
    with pytest.raises(UserError, match="energy.every_s"):
        EnergyUse(every_s=every_s)
