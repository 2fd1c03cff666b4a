import itertools
import threading
import time

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from toy_data import CountingData

from hivetrain.callbacks import EnergyUse, StopAtSwarmEpoch, SwarmStatus
from hivetrain.callbacks.energy import Counter
from hivetrain.errors import UserError
from hivetrain.model import CausalLM
from hivetrain.monitor.reader import RunReader
from hivetrain.strategies import HivemindStrategy
from hivetrain.swarm import start_dht, visible_maddrs

CONFIG = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}


class Hotkeyed(Callback):
    """Looks like what publishes contributions."""

    uid = 4

    class wallet:  # noqa: N801
        @staticmethod
        def address():
            return "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


class Losses(Callback):
    """The mean loss of each swarm epoch, by its own count."""

    def __init__(self):
        self.losses, self.means, self.epoch, self.batch_s = [], {}, 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batch_s.append(time.perf_counter() - self.began)
        self.losses.append(outputs["loss"].detach())
        if trainer.strategy.swarm_epoch != self.epoch:
            self.means[self.epoch] = float(torch.stack(self.losses).mean())
            self.losses, self.epoch = [], trainer.strategy.swarm_epoch


def has_ended(name, timeout_s):
    """Whether the thread of this name ends in time."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(timeout_s)
    return name not in {thread.name for thread in threading.enumerate()}


def trainer(callbacks, strategy, **options):
    return Trainer(
        accelerator="cpu", strategy=strategy, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=-1, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.fixture
def dht():
    running = start_dht([])
    yield running
    running.shutdown()


def fit(dht, status, *others, epochs=4, **options):
    strategy = HivemindStrategy(
        target_batch_size=16, run_id="told", initial_peers=visible_maddrs(dht), matchmaking_time=0.5, record_ttl=5.0
    )
    model = CausalLM(config=CONFIG, vocab_size=16, learning_rate=0.01, warmup_epochs=1)
    run = trainer([status, *others, StopAtSwarmEpoch(epochs=epochs)], strategy, **options)
    run.fit(model, datamodule=CountingData(block_size=16))


def test_a_miner_tells_what_it_did(dht):
    reader = RunReader(dht, "told")
    reader.open()
    losses = Losses()
    began = time.time()
    fit(dht, SwarmStatus(heldout_every=2), losses, Hotkeyed())
    (found,) = reader.read().statuses.values()
    reader.close()
    assert found.swarm_epoch == 4
    assert {note.epoch: note.loss for note in found.epochs} == pytest.approx(losses.means)
    assert [note.samples for note in found.epochs] == [16] * 4
    assert (found.samples, found.tokens) == (64, 64 * 16)
    assert [(note.epoch, note.outcome, note.number) for note in found.rounds] == [(n, "alone", n) for n in range(4)]
    assert found.heldout_epoch == 4
    assert 0 < found.heldout_loss < 5
    assert (found.device, found.hotkey) == ("cpu", Hotkeyed.wallet.address())
    assert began < found.at < time.time()
    assert has_ended("status", 0)


def test_the_energy_that_the_machines_counters_tell_is_in_the_record(dht, monkeypatch):
    pytest.importorskip("zeus")
    read_j = itertools.count(1000.0, 7.0)
    counters = [Counter("cpu", lambda: next(read_j)), Counter("gpu", lambda: 5.0)]
    monkeypatch.setattr("hivetrain.callbacks.energy.find_counters", lambda device: (counters, []))
    reader, energy = RunReader(dht, "told"), EnergyUse(every_s=60)
    reader.open()
    fit(dht, SwarmStatus(), energy, epochs=1)
    (found,) = reader.read().statuses.values()
    reader.close()
    assert found.energy_j in range(7, int(energy.energy_j), 7)


def test_what_is_not_known_is_none(dht):
    reader = RunReader(dht, "told")
    reader.open()
    fit(dht, SwarmStatus(), epochs=1, limit_val_batches=0)
    (found,) = reader.read().statuses.values()
    reader.close()
    assert (found.hotkey, found.energy_j, found.heldout_loss, found.n_windows) == (None, None, None, 0)


def test_what_lightnings_own_validation_finds_is_told(dht):
    class Found(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.loss = float(trainer.callback_metrics["val/loss"])

    found, reader = Found(), RunReader(dht, "told")
    reader.open()
    fit(dht, SwarmStatus(), found, epochs=1)
    (status,) = reader.read().statuses.values()
    reader.close()
    assert status.heldout_loss == found.loss


def test_a_dht_that_hangs_costs_training_nothing(dht, monkeypatch):
    asked = threading.Event()

    def hang(*_args):
        asked.set()
        time.sleep(3)
        return False

    monkeypatch.setattr(HivemindStrategy, "publish_own", hang)
    losses = Losses()
    began = time.monotonic()
    fit(dht, SwarmStatus(), losses, epochs=20)
    assert asked.is_set()
    assert sorted(losses.batch_s)[len(losses.batch_s) // 2] < 1.0
    assert losses.epoch == 20
    assert time.monotonic() - began < 60
    assert has_ended("status", 10)


def test_it_refuses_a_strategy_without_a_swarm():
    run = trainer([SwarmStatus()], "auto")
    with pytest.raises(UserError, match="leave status out"):
        run.fit(CausalLM(config=CONFIG, vocab_size=16), datamodule=CountingData(block_size=16))


@pytest.mark.parametrize("options", [{"every_s": 0.5}, {"heldout_every": -1}, {"heldout_batches": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match="at least"):
        SwarmStatus(**options)


def test_its_part_of_the_training_thread_is_under_a_hundredth_of_a_short_step():
    class Strategy:
        swarm_epoch = 3

    class Running:
        strategy = Strategy()

    status = SwarmStatus()
    batch, outputs = {"input_ids": torch.zeros(8, 512, dtype=torch.int64)}, {"loss": torch.tensor(1.0)}
    status._epoch = 3
    number = 2000
    began = time.perf_counter()
    for index in range(number):
        status.on_train_batch_end(Running(), None, outputs, batch, index)
    assert (time.perf_counter() - began) / number < 0.0005  # of a step of 50 ms
