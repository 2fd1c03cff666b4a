"""What a Lightning user may expect of HivemindStrategy: precisions, refusals, batches, callbacks, tidiness."""

import csv
import threading

import psutil
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from solo import QUIET, Module, OnBatch, distance, fit, loader, make_trainer, net, no_network, reference, samples
from torch.optim import lr_scheduler

from hivetrain.strategies import HivemindStrategy
from hivetrain.swarm import SwarmJoinError

# Precision


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("32-true", 1e-6), ("bf16-mixed", 2e-3), ("bf16-true", 1e-2), ("16-mixed", 2e-3)]
)
def test_each_precision_trains_as_plain_lightning_does_at_the_whole_batch(precision, tolerance):
    def arguments():
        if precision != "16-mixed":
            return {"precision": precision}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # Lightning turns precision="16-mixed" down on CPUs
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}

    class Plain(Module):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    ours, plain = Module(), Plain()
    fit(ours, loader(64, 4), epochs=8, target=8, **arguments())
    Trainer(accelerator="cpu", max_epochs=1, **QUIET, **arguments()).fit(plain, loader(64, 8))
    assert ours.net[0].weight.dtype == plain.net[0].weight.dtype
    assert distance(ours.net.float(), net()) > 0.02
    assert distance(ours.net.float(), plain.net.float()) < tolerance


def test_a_loss_scale_that_overflows_costs_microbatches_and_not_the_params():
    module = Module()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trainer = fit(module, loader(), epochs=4, target=8, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert trainer.strategy.samples_skipped > 0
    assert scaler.get_scale() < 2.0**24
    assert trainer.strategy.samples_contributed == 4 * 8
    assert all(param.isfinite().all() for param in module.parameters())


def test_a_microbatch_without_a_finite_gradient_is_left_out_and_counted():
    x, y = samples(32)
    x[4:8] = float("nan")
    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    trainer = fit(module, data, epochs=1, target=8)
    x, y = samples(32)
    expected, _, _ = reference([(torch.cat([x[0:4], x[8:12]]), torch.cat([y[0:4], y[8:12]]))])
    assert trainer.strategy.samples_skipped == 4
    assert distance(module.net, expected) < 1e-6


# What is refused


class Many(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False  # Lightning itself refuses it otherwise

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Lbfgs(Module):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer)


def decaying(optimizer):
    return lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))


def constant(optimizer):
    return lr_scheduler.ConstantLR(optimizer)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (Module, {"accumulate_grad_batches": 2}, "accumulate_grad_batches must be 1.*Raise target_batch_size"),
        (Module, {"callbacks": [callbacks.GradientAccumulationScheduler({1: 2})]}, "accumulate_grad_batches must be 1"),
        (Module, {"callbacks": [callbacks.StochasticWeightAveraging(0.1)]}, "StochasticWeightAveraging"),
        (lambda: Module(make_scheduler=plateau, scheduler={"monitor": "train/loss"}), {}, "ReduceLROnPlateau"),
        (lambda: Module(make_scheduler=constant, scheduler={"frequency": 2}), {}, "frequency must be 1"),
        (Many, {}, "one optimizer's gradients, got 2"),
        (Manual, {}, "optimizes by hand"),
        (Lbfgs, {}, "LBFGS"),
    ],
)
def test_what_a_swarm_cannot_train_with_is_refused_before_the_network(module, arguments, message, monkeypatch):
    with no_network(monkeypatch), pytest.raises(MisconfigurationException, match=message):
        fit(module(), loader(), **({"max_epochs": 2} | arguments))


def test_two_devices_in_one_process_are_refused():
    with pytest.raises(MisconfigurationException, match="one device per process.*devices=1"):
        fit(Module(), loader(), devices=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_batch_size": 0}, "target_batch_size must be at least 1, got 0"),
        ({"on_failed_round": "hope"}, r"on_failed_round must be one of .*retry.*'hope'"),
        ({"run_id": ""}, "run_id must be a non-empty name"),
        ({"run_id": "a.b"}, "without dots"),
        ({"matchmaking_time": 60.0}, "less than averaging_timeout"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"compression": "zip"}, "zip"),
    ],
)
def test_arguments_out_of_range_are_refused_by_the_constructor(arguments, message):
    with pytest.raises(MisconfigurationException, match=message):
        HivemindStrategy(**arguments)


def test_options_of_the_predecessor_that_are_gone_are_no_arguments():
    for name in ("delay_grad_averaging", "reuse_grad_buffers", "offload_optimizer", "averager_opts", "verbose"):
        with pytest.raises(TypeError, match=name):
            HivemindStrategy(**{name: True})


# Batches


def test_the_batch_size_is_read_off_each_batch_or_given():
    x, y = samples(10)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)  # 4, 4 and 2 samples
    module = Module()
    trainer = fit(module, data, epochs=1, target=10)
    expected, _, _ = reference([(x, y)])
    assert [report.samples for report in trainer.strategy.rounds] == [10]
    assert distance(module.net, expected) < 1e-6
    given = HivemindStrategy(target_batch_size=8, batch_size=8, initial_peers="")
    trainer = fit(Module(), data, epochs=3, strategy=given)
    assert [report.samples for report in given.rounds] == [8, 8, 8]
    assert trainer.global_step == 3


def test_a_batch_whose_size_cannot_be_told_is_an_error():
    class Opaque(Module):
        def loss(self, batch):
            return self.net(torch.ones(4, 4)).mean()

    with pytest.raises(MisconfigurationException, match="batch_size"):
        fit(Opaque(), torch.utils.data.DataLoader(["text"] * 8, collate_fn=lambda _: object()), epochs=1)


def test_a_batch_that_training_step_skips_counts_nothing():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    trainer = fit(Skips(), loader(), epochs=2, target=8)
    assert trainer.global_step == 7  # microbatches 0 and 2, then 4 and 6
    assert trainer.strategy.samples_contributed == 16


def test_max_steps_counts_microbatches():
    trainer = fit(Module(), loader(), target=8, max_steps=10)
    assert (trainer.global_step, trainer.strategy.swarm_epoch) == (10, 5)


# Everything else of Lightning's


@pytest.mark.parametrize("bar", [callbacks.TQDMProgressBar, callbacks.RichProgressBar])
def test_callbacks_loggers_and_progress_bars_work_unchanged(bar, tmp_path):
    module = Module(make_scheduler=decaying)
    best = callbacks.ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True, every_n_epochs=1)
    stop = callbacks.EarlyStopping("val/loss", patience=2, min_delta=1e9)
    trainer = make_trainer(
        target=8,
        callbacks=[best, stop, bar(), callbacks.LearningRateMonitor()],
        logger=CSVLogger(tmp_path, "", ""),
        enable_checkpointing=True,
        enable_progress_bar=True,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader(16, 4), loader(8, 4, seed=2))
    assert trainer.current_epoch == 2 + 1  # EarlyStopping saw no gain in two epochs after the first
    assert (tmp_path / "last.ckpt").exists()
    assert best.best_model_score < 100
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["swarm/epoch"]) for row in rows if row["swarm/epoch"]] == list(range(6))
    rates = [float(row["lr-AdamW"]) for row in rows if row["lr-AdamW"]]
    assert rates == pytest.approx([0.01 / (1 + epoch) for epoch in range(6) for _ in range(2)])
    assert any(row["train/loss"] for row in rows)
    assert trainer.callback_metrics["val/loss"] == pytest.approx(float(module.loss(samples(8, seed=2))), rel=1e-4)


def test_the_optimizer_hooks_run_once_for_each_global_update():
    module = Module()
    fit(module, loader(), epochs=3, target=16)
    assert (module.updates, len(module.losses)) == (3, 12)


def test_building_and_everything_but_fitting_stays_offline(monkeypatch):
    module = Module()
    with no_network(monkeypatch):
        trainer = make_trainer(strategy=HivemindStrategy(initial_peers="http://127.0.0.1:9"))
        trainer.validate(module, loader(8), verbose=False)
        trainer.test(module, loader(8), verbose=False)
        assert len(trainer.predict(module, loader(8))) == 2
        assert trainer.strategy.peer_id is None
        with pytest.raises(SwarmJoinError, match="network was touched"):  # the guard itself works
            fit(module, loader())


def test_one_process_can_fit_twice_and_leaves_neither_process_nor_thread():
    fit(Module(), loader(), epochs=1)  # loads what Lightning and hivemind start once for good
    threads, processes = threading.active_count(), children()
    module, seen = Module(), []
    trainer = make_trainer(callbacks=[OnBatch(lambda trainer: seen.append(trainer.strategy.peer_id))], max_steps=4)
    trainer.fit(module, loader())
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, loader())
    assert len(set(seen)) == 2
    assert None not in seen
    assert len(module.losses) == 8
    assert module.losses[7] < module.losses[0]
    assert threading.active_count() == threads
    assert children() == processes


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_training_step_that_fails_leaves_neither_process_nor_thread():
    class Broken(Module):
        def training_step(self, batch, batch_idx):
            raise ArithmeticError("on purpose")

    fit(Module(), loader(), epochs=1)
    threads, processes = threading.active_count(), children()
    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(Broken(), loader())
    assert threading.active_count() == threads
    assert children() == processes
