"""What a miner writes beside its checkpoints: where the disk is full some of it is lost, and the training goes on."""

import csv
import json
import logging
import sqlite3

import numpy as np
import pytest
from test_callbacks import model, silent, trainer
from test_checkpoint_disk import room_for
from toy_data import CountingData

from hivetrain.callbacks import MinerReport, StopAtSwarmEpoch
from hivetrain.data.cache import TokenCache
from hivetrain.demo.reports import MinerLog
from hivetrain.loggers import MetricsTable


def test_a_report_on_a_full_disk_does_not_end_the_training(caplog):
    run = trainer(MinerReport("/dev/full", val_batches=0), StopAtSwarmEpoch(3), silent())
    with caplog.at_level(logging.WARNING):
        run.fit(model(), CountingData())
    assert run.strategy.swarm_epoch == 3
    assert caplog.text.count("the report /dev/full lacks 'start' of swarm epoch 0") == 1
    assert caplog.text.count("No space left on device. Training goes on") == 1


@pytest.mark.parametrize("room", [1, 300, 400, 700])
def test_lines_of_a_report_are_whole_or_missing_and_later_ones_follow(tmp_path, room):
    report, path = MinerReport(str(tmp_path / "report.jsonl")), tmp_path / "report.jsonl"
    report.setup(None, None, "fit")
    log = MinerLog(path)
    with room_for(room):
        for epoch in range(10):
            report._write("epoch", epoch, samples=epoch, tokens=epoch, loss=1.0)
            log.read()
    fitted = path.read_text().count("\n")
    assert fitted == room // len(
        '{"event": "epoch", "swarm_epoch": 0, "wall_s": 0.0, "samples": 0, "tokens": 0, "loss": 1.0}\n'
    )
    report._write("epoch", 10, samples=10, tokens=10, loss=1.0)
    report.teardown(None, None, "fit")
    log.read()
    assert [json.loads(line)["swarm_epoch"] for line in path.open()] == list(log.epochs) == [*range(fitted), 10]


def tokens(number):
    return np.full(20_000, number, dtype=np.uint16)


@pytest.mark.parametrize("room", [10_000, 40_000])  # too little for SQLite's index of its journal, and for another unit
def test_a_token_cache_on_a_full_disk_stores_nothing_and_is_read_on(tmp_path, caplog, room):
    cache = TokenCache(tmp_path, 10_000_000)
    cache.put("data", 0, tokens(0))
    cache.close()
    with room_for(room), caplog.at_level(logging.WARNING):
        cache.put("data", 1, tokens(1))
        cache.put("data", 2, tokens(2))
        for _ in range(20):  # each notes the time of use, until there is no room for that either
            found = cache.get("data", 0)
        assert cache.get("data", 1) is None
    assert found is None if room == 10_000 else found.tolist() == tokens(0).tolist()
    assert caplog.text.count("Free some space there. The training goes on") == 1
    cache.put("data", 2, tokens(2))
    assert cache.get("data", 2).tolist() == tokens(2).tolist()
    assert cache.get("data", 0).tolist() == tokens(0).tolist()


def test_a_token_cache_is_read_where_sqlite_says_that_the_disk_is_full(tmp_path, caplog):
    cache = TokenCache(tmp_path, 10_000_000)
    cache.put("data", 0, tokens(0))
    cache._connection.execute(f"PRAGMA max_page_count={cache._connection.execute('PRAGMA page_count').fetchone()[0]}")
    with caplog.at_level(logging.WARNING):
        cache.put("data", 1, tokens(1))
    assert "database or disk is full. Free some space there" in caplog.text
    assert cache.get("data", 0).tolist() == tokens(0).tolist()
    assert cache.get("data", 1) is None
    cache.close()
    with sqlite3.connect(cache.path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("new_column", [False, True])
def test_a_table_of_metrics_ends_with_a_whole_row_and_the_training_goes_on(tmp_path, caplog, new_column):
    table = MetricsTable(str(tmp_path), name="run", flush_logs_every_n_steps=1)
    for step in range(20):
        table.log_metrics({"loss": 1 / (step + 3)}, step)
    with room_for(450), caplog.at_level(logging.WARNING):
        for step in range(20, 60):
            table.log_metrics({"loss": 1 / (step + 3), **({"longer": 1 / 3} if new_column else {})}, step)
        table.finalize("success")
    assert caplog.text.count("ends here: File too large. Training goes on") == 1
    assert table.experiment.metrics == []
    with (tmp_path / "run" / "version_0" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    assert [float(row["loss"]) for row in rows] == [1 / (step + 3) for step in range(len(rows))]
    assert len(rows) > 10
