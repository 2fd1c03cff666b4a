import json
import multiprocessing
import os
import random
import signal
import time
import warnings

import lightning.pytorch as pl
import psutil
import pytest
import torch

from hivetrain.data import EmbeddedCorpus, RefinedWebDataModule
from hivetrain.data.errors import DataError

warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)


class Memory(pl.LightningModule):
    """A model that remembers each block it was trained on; its memory goes into the checkpoint like any parameter."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.blocks, self.ids = [], []

    def training_step(self, batch, batch_idx):
        self.blocks += [[a.data_pass, a.window, a.unit, a.k] for a in self.trainer.datamodule.consumed_addresses]
        self.ids.append(batch["input_ids"].sum().item())
        return self.number * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["memory"] = {"blocks": self.blocks, "ids": self.ids}

    def on_load_checkpoint(self, checkpoint):
        self.blocks, self.ids = checkpoint["memory"]["blocks"], checkpoint["memory"]["ids"]


class SaveAndDie(pl.Callback):
    """Saves after every step, and kills its own process after a certain one: before that step is saved, or after."""

    def __init__(self, path, last_step=None, before_saving=False, note_workers=None):
        self.path, self.last_step, self.before_saving, self.note_workers = path, last_step, before_saving, note_workers

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        dying = trainer.global_step == self.last_step
        if dying and self.note_workers:
            pids = [child.pid for child in psutil.Process().children()]
            self.note_workers.write_text(json.dumps(pids))
        if dying and self.before_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.save_checkpoint(f"{self.path}.partial")
        os.replace(f"{self.path}.partial", self.path)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(steps, path, workers, callback=None, **options):
    data = RefinedWebDataModule(block_size=128, batch_size=20, slot=2, num_workers=workers, **options)
    model = Memory()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[callback or SaveAndDie(path)],
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=path if path.exists() else None)
    return model, data


def test_twenty_kills_at_random_steps_lose_and_repeat_nothing(tmp_path):
    path, choose, done = tmp_path / "run.ckpt", random.Random(1), 0
    noted = []
    context = multiprocessing.get_context("fork")
    for kill in range(20):
        last_step = done + choose.randint(1, 6)
        before_saving, workers = choose.random() < 0.5, choose.choice([0, 1, 2, 3])
        noted.append(tmp_path / f"workers-{kill}.json")
        callback = SaveAndDie(path, last_step, before_saving, noted[-1])
        child = context.Process(target=fit, args=(last_step + 50, path, workers, callback))
        child.start()
        child.join()  # with a time limit it would wait for the workers too, which hold its pipe
        assert child.exitcode == -signal.SIGKILL
        assert len(json.loads(noted[-1].read_text())) == workers
        done = last_step - before_saving
    model, _ = fit(done + 5, path, workers=2)
    expected, _ = fit(done + 5, tmp_path / "reference.ckpt", workers=0)
    assert len(expected.blocks) == 20 * (done + 5) == len({tuple(block) for block in expected.blocks})
    assert len({unit for _, _, unit, _ in expected.blocks}) >= 3
    assert model.blocks == expected.blocks
    assert model.ids == expected.ids
    pids = [pid for note in noted for pid in json.loads(note.read_text())]
    deadline = time.monotonic() + 15
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, f"workers outlived their parents: {left}"
        time.sleep(0.1)


def test_the_saved_state_counts_consumed_blocks_and_is_small(tmp_path):
    _, data = fit(3, tmp_path / "a.ckpt", workers=2)
    state = data.state_dict()
    assert state["consumed"] == 60
    assert state["block"] == 60
    assert len(json.dumps(state)) < 1000
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["RefinedWebDataModule"] == state


def test_a_second_fit_of_the_same_module_goes_on_where_the_first_ended():
    data = RefinedWebDataModule(block_size=128, batch_size=4, slot=2)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    first, second = Memory(), Memory()
    pl.Trainer(max_steps=3, **options).fit(first, datamodule=data)
    pl.Trainer(max_steps=2, **options).fit(second, datamodule=data)
    assert [block[3] for block in first.blocks + second.blocks] == list(range(20))


def test_epochs_of_limited_length_do_not_drop_what_was_fetched_ahead(tmp_path):
    data = RefinedWebDataModule(block_size=128, batch_size=4, slot=2, num_workers=1)
    model = Memory()
    pl.Trainer(
        accelerator="cpu", max_epochs=4, limit_train_batches=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(model, datamodule=data)  # fmt: skip
    assert [block[3] for block in model.blocks] == list(range(48))


@pytest.mark.parametrize(
    "other",
    [{"tokenizer": "gpt2"}, {"block_size": 256}, {"seed": 1}, {"n_slots": 9}, {"units_per_window": 2}],
    ids=lambda other: next(iter(other)),
)
def test_a_checkpoint_of_other_data_is_refused(other):
    data = RefinedWebDataModule(block_size=128, slot=0)
    next(iter(data.train_dataloader()))
    resumed = RefinedWebDataModule(**{"block_size": 128, "slot": 0, **other})
    resumed.load_state_dict(data.state_dict())
    with pytest.raises(DataError, match="belongs to other data"):
        resumed.train_dataloader()


def test_a_checkpoint_of_another_slot_starts_at_our_own_units(caplog):
    data = RefinedWebDataModule(EmbeddedCorpus(), block_size=128, slot=0, n_slots=10)
    for _, _ in zip(data.train_dataloader(), range(60), strict=False):
        pass
    window = data.cursor.window
    assert window > 0
    resumed = RefinedWebDataModule(EmbeddedCorpus(), block_size=128, slot=1, n_slots=10)
    resumed.load_state_dict(data.state_dict())
    next(iter(resumed.train_dataloader()))
    assert resumed.consumed_addresses[0].unit == resumed.assignment.units(window, 1)[0]
    assert resumed.consumed_addresses[0].k == 0
    assert "checkpoint is of slot 0, we are slot 1" in caplog.text
