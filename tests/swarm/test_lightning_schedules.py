"""Learning rates belong to the swarm epoch: ``scheduler(e)`` at epoch ``e``."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import LRSchedulerConfig
from solo import Module, fit, loader, reference, samples
from torch.optim import lr_scheduler

from hivetrain.strategies import HivemindStrategy
from hivetrain.strategies.schedules import EpochSchedules

SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ["lambda", "sequential"])
def test_a_scheduler_is_at_the_swarm_epoch_whatever_its_interval(name, interval):
    module = Module(make_scheduler=SCHEDULERS[name], scheduler={"interval": interval})
    fit(module, loader(12, 4), epochs=7, target=8)  # Lightning's epochs have 3 microbatches, the swarm's 2
    _, _, lrs = reference([samples(8)] * 7, make_scheduler=SCHEDULERS[name])
    assert module.lrs == [(epoch, lrs[epoch]) for epoch in range(7) for _ in range(2)]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_scheduler_follows_jumps_ahead_and_back(name):
    def make():
        module = Module()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        return optimizer, EpochSchedules([LRSchedulerConfig(SCHEDULERS[name](optimizer))], optimizer, module)

    expected = {}
    for epoch in (0, 3, 7, 12):
        optimizer, schedules = make()
        schedules.follow(epoch)
        expected[epoch] = optimizer.param_groups[0]["lr"]
    assert len(set(expected.values())) > 2
    optimizer, schedules = make()
    for epoch in (7, 3, 12, 0, 7):
        schedules.follow(epoch)
        assert optimizer.param_groups[0]["lr"] == expected[epoch]


def test_scheduler_fn_schedules_a_module_that_has_no_scheduler():
    module = Module()
    strategy = HivemindStrategy(target_batch_size=8, initial_peers="", scheduler_fn=SCHEDULERS["lambda"])
    fit(module, loader(), epochs=3, strategy=strategy)
    assert module.lrs == [(epoch, pytest.approx(0.01 / (1 + epoch))) for epoch in range(3) for _ in range(2)]
    strategy = HivemindStrategy(initial_peers="", scheduler_fn=SCHEDULERS["lambda"])
    with pytest.raises(MisconfigurationException, match="scheduler_fn and a scheduler of configure_optimizers"):
        fit(Module(make_scheduler=SCHEDULERS["cosine"]), loader(), strategy=strategy)
