import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from rich.console import Console
from toy_data import CountingData

from hivetrain.callbacks import GenerationSample, MinerReport, StopAtSwarmEpoch, SwarmCheckpoint, SwarmProgress
from hivetrain.errors import UserError
from hivetrain.model import CausalLM


@dataclass
class Round:
    exchange_s: float = 0.25
    matchmaking_s: float = 0.5
    group_size: int = 2
    samples: int = 8
    outcome: str = "committed"


class PairedStrategy(SingleDeviceStrategy):
    """One process that counts as two peers: an update every two microbatches, each of which stands for two."""

    target_batch_size = 16
    peer_id = "QmPeer"
    num_peers = 2
    visible_maddrs = ("/ip4/127.0.0.1/tcp/4000/p2p/QmPeer",)

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.microbatches = 0
        self.rounds = []

    @property
    def swarm_epoch(self) -> int:
        return self.microbatches // 2

    @property
    def samples_accumulated(self) -> int:
        return self.microbatches % 2 * 8

    def params_digest(self) -> str:
        return "digest"

    def optimizer_step(self, optimizer, closure, model=None, **kwargs):
        loss = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.microbatches += 1
        if self.microbatches % 2 == 0:
            self.rounds.append(Round())
        return loss


def model() -> CausalLM:
    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 32}
    return CausalLM(config=config, vocab_size=16, learning_rate=1e-2, warmup_epochs=2)


def trainer(*callbacks: Callback, paired: bool = True, **arguments) -> Trainer:
    saves = any(isinstance(callback, SwarmCheckpoint) for callback in callbacks)
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{
            "strategy": PairedStrategy() if paired else "auto",
            "max_epochs": -1,
            "enable_checkpointing": saves,
            **arguments,
        },
    )


def silent() -> SwarmProgress:
    progress = SwarmProgress()
    progress.disable()
    return progress


@pytest.mark.parametrize(("paired", "steps"), [(True, 6), (False, 3)])
def test_training_stops_at_the_swarm_epoch_or_without_a_swarm_at_that_step(paired: bool, steps: int) -> None:
    run = trainer(StopAtSwarmEpoch(3), silent(), paired=paired)
    run.fit(model(), CountingData())
    assert run.global_step == steps


def test_a_miner_that_joins_too_late_trains_nothing() -> None:
    run = trainer(StopAtSwarmEpoch(3), silent())
    run.strategy.microbatches = 8
    run.fit(model(), CountingData())
    assert run.global_step == 0


def test_report_tells_what_each_swarm_epoch_took(tmp_path) -> None:
    seconds = iter(range(100))
    report = MinerReport(str(tmp_path / "deep" / "report.jsonl"), val_batches=2, clock=lambda: next(seconds))
    learner, data = model(), CountingData(rows=40)
    start_loss = sum(learner.loss(batch).item() for _, batch in zip(range(2), data.val_dataloader(), strict=False)) / 2
    losses = []

    class Spy(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            losses.append(outputs["loss"].item())

    trainer(StopAtSwarmEpoch(3), report, silent(), Spy()).fit(learner, data)
    start, *epochs, end = [json.loads(line) for line in (tmp_path / "deep" / "report.jsonl").open()]
    assert (start["event"], end["event"]) == ("start", "end")
    assert start["peer_id"] == end["peer_id"] == "QmPeer"
    assert start["visible_maddrs"] == ["/ip4/127.0.0.1/tcp/4000/p2p/QmPeer"]
    assert start["heldout_loss"] == pytest.approx(start_loss, abs=1e-5)
    assert end["heldout_loss"] < start_loss - 0.1
    assert [record["swarm_epoch"] for record in epochs] == [0, 1, 2]
    assert [record["loss"] for record in epochs] == pytest.approx([(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)])
    assert all((record["samples"], record["tokens"], record["peers"]) == (8, 128, 2) for record in epochs)
    assert epochs[0]["exchange_s"] == 0.25
    assert epochs[0]["outcome"] == "committed"
    assert (end["swarm_epoch"], end["samples"], end["tokens"], end["params_digest"]) == (3, 24, 384, "digest")
    assert end["wall_s"] > start["wall_s"]


def test_report_without_a_swarm_says_null(tmp_path) -> None:
    report = MinerReport(str(tmp_path / "report.jsonl"), val_batches=0)
    trainer(report, silent(), paired=False, max_steps=2).fit(model(), CountingData())
    start, first, _, end = [json.loads(line) for line in (tmp_path / "report.jsonl").open()]
    assert start["peer_id"] is start["heldout_loss"] is first["peers"] is end["params_digest"] is None


def test_a_report_that_cannot_be_written_is_refused_before_training(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        trainer(MinerReport(str(tmp_path / "file" / "report.jsonl")), silent()).fit(model(), CountingData())


def test_checkpoints_come_every_few_epochs_and_at_the_end_and_only_the_newest_stay(tmp_path) -> None:
    callback = SwarmCheckpoint(str(tmp_path), every_n_epochs=2, keep=2)
    learner = model()
    (tmp_path / "epoch-00000001.unfinished").write_text("left by a crash")
    trainer(callback, StopAtSwarmEpoch(5), silent()).fit(learner, CountingData())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-00000004.ckpt",
        "epoch-00000005.ckpt",
        "last.ckpt",
    ]
    assert (tmp_path / "last.ckpt").readlink() == Path("epoch-00000005.ckpt")
    again = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), learner.parameters(), strict=True))


def test_training_resumes_from_the_last_checkpoint_as_if_never_interrupted(tmp_path) -> None:
    whole = model()
    trainer(silent(), paired=False, max_epochs=3).fit(whole, CountingData(rows=16))
    trainer(SwarmCheckpoint(str(tmp_path)), silent(), paired=False, max_epochs=2).fit(model(), CountingData(rows=16))
    resumed = model()
    run = trainer(silent(), paired=False, max_epochs=3)
    run.fit(resumed, CountingData(rows=16), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert run.global_step == 12
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_save_that_dies_half_way_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch) -> None:
    callback = SwarmCheckpoint(str(tmp_path), every_n_epochs=1)
    trainer(callback, StopAtSwarmEpoch(1), silent()).fit(model(), CountingData())
    before = (tmp_path / "last.ckpt").read_bytes()

    def dies(self: Trainer, path: Path, weights_only: bool | None = None) -> None:
        Path(path).write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(Trainer, "save_checkpoint", dies)
    with pytest.raises(OSError, match="no space left"):
        trainer(callback, StopAtSwarmEpoch(2), silent()).fit(model(), CountingData())
    assert (tmp_path / "last.ckpt").read_bytes() == before


SAVER = """
import sys
from lightning.pytorch import Trainer
from hivetrain.callbacks import SwarmCheckpoint
from test_callbacks import model, silent
from toy_data import CountingData
callback = SwarmCheckpoint(sys.argv[1], every_n_epochs=1, keep=1)
Trainer(accelerator="cpu", max_epochs=-1, logger=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[callback, silent()]).fit(model(), CountingData())
"""


def test_kill_in_mid_training_leaves_a_loadable_checkpoint(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "last.ckpt").exists() or int((tmp_path / "last.ckpt").readlink().stem[6:]) < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    assert (
        CausalLM.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
        .loss(next(iter(CountingData().val_dataloader())))
        .isfinite()
    )


def test_sample_is_written_every_few_epochs_and_at_the_end(caplog) -> None:
    sample = GenerationSample(prompt="abc", every_n_epochs=2, max_new_tokens=4, temperature=0)
    learner = model()
    run = trainer(sample, StopAtSwarmEpoch(3), silent())
    with caplog.at_level("INFO", logger="hivetrain.callbacks.sample"):
        run.fit(learner, CountingData())
    lines = [record.message for record in caplog.records if record.name == "hivetrain.callbacks.sample"]
    assert [line[:24] for line in lines] == ["sample at swarm epoch 2:", "sample at swarm epoch 3:"]
    text = lines[-1].partition(": ")[2]
    assert text.startswith("abc")
    assert len(text) == 7
    assert text == sample.sample(run, learner)


def test_sample_refuses_data_without_an_encoder() -> None:
    data = CountingData()
    data.encoder = None
    with pytest.raises(UserError, match="encoder"):
        trainer(GenerationSample(), silent()).fit(model(), data)


def test_progress_without_a_terminal_is_one_line_for_each_epoch(caplog) -> None:
    seconds = iter(0.1 * n for n in range(1000))
    progress = SwarmProgress(clock=lambda: next(seconds), console=Console(file=io.StringIO()))
    with caplog.at_level("INFO", logger="hivetrain.callbacks.progress"):
        trainer(progress, StopAtSwarmEpoch(3)).fit(model(), CountingData())
    first, *lines = [record.message for record in caplog.records if record.name == "hivetrain.callbacks.progress"]
    assert first == "peer QmPeer is visible at /ip4/127.0.0.1/tcp/4000/p2p/QmPeer"
    assert [line.split("  ")[0] for line in lines] == ["swarm epoch 1", "swarm epoch 2", "swarm epoch 3"]
    # two microbatches of 64 tokens, in the two clock calls at their ends and one of _show: 0.3 s
    assert lines[1].split("  ")[2:] == ["tokens/s 427", "peers 2", "samples 0/16", "exchange 0.25 s"]


def test_progress_on_a_terminal_is_a_live_table() -> None:
    screen = io.StringIO()
    progress = SwarmProgress(refresh_s=1e-9, console=Console(file=screen, force_terminal=True, width=120))
    trainer(progress, StopAtSwarmEpoch(2)).fit(model(), CountingData())
    text = screen.getvalue()
    assert all(title in text for title in ("swarm epoch", "loss", "tokens/s", "peers", "samples", "exchange"))
    assert "8/16" in text


def test_progress_takes_the_place_of_lightnings_bar() -> None:
    run = trainer(silent(), max_steps=1)
    assert isinstance(run.progress_bar_callback, SwarmProgress)


class RestoringStrategy(PairedStrategy):
    """Like a strategy in a swarm, it knows its swarm epoch only when training starts."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.microbatches = 8


def test_a_run_that_joins_at_a_later_epoch_counts_from_there(tmp_path) -> None:
    report = MinerReport(str(tmp_path / "report.jsonl"), val_batches=0)
    checkpoint = SwarmCheckpoint(str(tmp_path), every_n_epochs=4)
    run = trainer(report, checkpoint, StopAtSwarmEpoch(5), silent(), strategy=RestoringStrategy())
    run.fit(model(), CountingData())
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").open()]
    assert [(line["event"], line["swarm_epoch"]) for line in lines] == [("start", 4), ("epoch", 4), ("end", 5)]
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-00000005.ckpt"]
    late = trainer(StopAtSwarmEpoch(3), silent(), strategy=RestoringStrategy())
    late.fit(model(), CountingData())
    assert late.global_step == 0
