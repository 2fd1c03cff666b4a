"""Peers together train like one plain process at their joint batch.

Each peer logs which samples went into which global update, so that the plain process can replay exactly those.
"""

import copy
import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from peers import FORKSERVER, assert_ways, over_both
from solo import Module, adamw, distance, loader, make_trainer, net, reference, samples, sgd
from solo import fit as fit_alone
from torch.optim.lr_scheduler import LambdaLR
from worker import report_fields

from hivetrain.averaging.accumulator import GradientAccumulator
from hivetrain.strategies import HivemindStrategy

EPOCHS, TARGET, CLIP = 20, 24, 0.5
POOL = 4096


def factor(epoch):
    return (1 + epoch) / 5 if epoch < 5 else 5 / (1 + epoch)


def schedule(optimizer):
    return LambdaLR(optimizer, factor)


# One process


def test_the_first_update_is_plain_adamws():
    module = Module()
    fit_alone(module, loader(), epochs=1, target=8)
    expected, _, _ = reference([tuple(part[:8] for part in samples(256))])
    assert distance(module.net, net()) > 0.005
    assert distance(module.net, expected) < 1e-6


def test_unequal_microbatches_give_the_sample_weighted_mean():
    param = torch.nn.Parameter(torch.zeros(3))
    accumulator = GradientAccumulator([param])
    for count, mean in ((2, 1.0), (4, 3.0)):
        param.grad = torch.full((3,), mean)
        accumulator.add(count)
    assert torch.equal(accumulator.mean(), torch.full((3,), (2 * 1.0 + 4 * 3.0) / 6))


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_unequal_microbatches_train_as_whole_batches_do(make_optimizer):
    x, y = samples(120)
    starts = [0, 2, 6, 7, 12]  # microbatches of 2, 4, 1 and 5 samples, again and again
    batches = [list(range(a + k, b + k)) for k in range(0, 120, 12) for a, b in zip(starts, starts[1:], strict=False)]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_sampler=batches)
    module = Module(make_optimizer)
    fit_alone(module, data, epochs=10, target=12)
    expected, _, _ = reference([(x[k : k + 12], y[k : k + 12]) for k in range(0, 120, 12)], make_optimizer)
    assert distance(module.net, expected) < 1e-6


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_clipping_applies_to_the_averaged_gradient(make_optimizer):
    x, y = samples(80)
    module = Module(make_optimizer)
    fit_alone(module, loader(80, 2), epochs=10, target=8, gradient_clip_val=0.1)
    batches = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 80, 8)]
    clipped, _, _ = reference(batches, make_optimizer, clip=0.1)
    free, _, _ = reference(batches, make_optimizer)
    assert distance(clipped, free) > 1e-3
    assert distance(module.net, clipped) < 1e-6


# Several processes


@over_both(["num_peers", "overlap"], [(2, False), (3, False), (2, True)], quick=[(3, False)])
def test_peers_match_one_process_at_the_joint_batch_size(num_peers, overlap, transport, bootstrap, tmp_path):
    peers = run_peers(num_peers, overlap, transport, bootstrap, tmp_path)
    updates = []
    for epoch in range(EPOCHS):
        update = [microbatch for peer in peers for microbatch in peer["used"].get(str(epoch), [])]
        told = {report["samples"] for peer in peers for report in peer["rounds"] if is_commit(report, epoch)}
        assert told == {sum(len(ids) for ids, _, _ in update)}  # what the reports say is what was averaged
        assert {at for _, _, at in update} <= ({epoch - 1, epoch} if overlap else {epoch})
        updates.append(update)
    stale = [at for epoch, update in enumerate(updates) for _, _, at in update if at < epoch]
    assert bool(stale) == overlap
    expected, losses = replay(updates)
    assert joint_losses(updates) == pytest.approx(losses, abs=1e-4)
    assert distance(expected, net()) > 0.05
    for peer in peers:
        final = net()
        final.load_state_dict({name: torch.tensor(value) for name, value in peer["params"].items()})
        assert peer["epoch"] == EPOCHS
        assert_ways(peer["rounds"], transport)
        assert distance(final, expected) < 1e-4
        assert peer["lrs"] == [[epoch, pytest.approx(0.01 * factor(epoch))] for epoch, _ in peer["lrs"]]
    assert len({peer["digest"] for peer in peers}) == 1
    together = [report for report in peers[0]["rounds"] if report["group_size"] == num_peers]
    assert len(together) > EPOCHS / 2


def is_commit(report, epoch):
    return report["swarm_epoch"] == epoch and report["outcome"] in ("averaged", "alone")


def replay(updates):
    """Plain torch: each update's joint gradient, of each microbatch at the params that its peer had then."""
    model = net()
    history, losses = [copy.deepcopy(model)], []
    optimizer = adamw(model.parameters())
    scheduler = schedule(optimizer)
    x, y = samples(POOL)
    for update in updates:
        optimizer.zero_grad()
        count, total = sum(len(ids) for ids, _, _ in update), 0.0
        for at in sorted({at for _, _, at in update}):
            ids = [i for microbatch, _, computed_at in update if computed_at == at for i in microbatch]
            loss = torch.nn.functional.mse_loss(history[at](x[ids]), y[ids]) * len(ids) / count
            for param, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, history[at].parameters()), strict=True
            ):
                param.grad = gradient if param.grad is None else param.grad + gradient
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(total)
        history.append(copy.deepcopy(model))
    return model, losses


def joint_losses(updates):
    """The mean over all samples of each update, from the means that the peers saw."""
    return [
        sum(len(ids) * loss for ids, loss, _ in update) / sum(len(ids) for ids, _, _ in update) for update in updates
    ]


def run_peers(count, overlap, transport, bootstrap, tmp_path):
    outs = [tmp_path / f"{index}.json" for index in range(count)]
    processes = [
        FORKSERVER.Process(target=run_peer, args=(bootstrap, count, overlap, transport, index, outs[index]))
        for index in range(count)
    ]
    for process in processes:
        process.start()
    try:
        for process, out in zip(processes, outs, strict=True):
            process.join(150)
            assert process.exitcode == 0, out.with_suffix(".log").read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [json.loads(out.read_text()) for out in outs]


# The peer


class Slow(Module):
    def loss(self, batch):
        time.sleep(0.05)  # as a real model would take, so that an update is not full before others have heard of it
        return super().loss(batch[:2])


class Log(Callback):
    """Keeps the microbatches that are in no update yet until it is known what became of them."""

    def __init__(self, num_peers):
        self.num_peers, self.used, self.rounds, self.dropped = num_peers, {}, 0, 0
        self.gathered, self.in_exchange = [], None  # the latter with overlap only

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        deadline = time.monotonic() + 90
        while batch_idx == 0 and trainer.strategy.num_peers < self.num_peers:
            assert time.monotonic() < deadline, "the other peers did not come"
            time.sleep(0.05)
        self.computed_at = trainer.strategy.swarm_epoch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        strategy, collaboration = trainer.strategy, trainer.strategy._collaboration
        self.gathered.append((batch[2].tolist(), module.losses[-1], self.computed_at))
        for report in strategy.rounds[self.rounds :]:
            if not report.committed:
                self.gathered, self.in_exchange = (self.in_exchange or []) + self.gathered, None
            elif self.in_exchange is not None:
                self.used[report.swarm_epoch], self.in_exchange = self.in_exchange, None
            else:
                self.used[report.swarm_epoch], self.gathered = self.gathered, []
        if strategy.samples_dropped > self.dropped:
            self.gathered, self.in_exchange = [], None
        if collaboration._pending is not None and self.in_exchange is None:
            self.gathered, self.in_exchange = [], self.gathered
        self.rounds, self.dropped = len(strategy.rounds), strategy.samples_dropped
        assert sum(len(ids) for ids, _, _ in self.gathered) == collaboration.accumulator.samples


def run_peer(bootstrap, num_peers, overlap, transport, index, out: Path):
    log_file = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    torch.set_num_threads(1)
    x, y = samples(POOL)
    ids = torch.randperm(POOL, generator=torch.Generator().manual_seed(index)).repeat(4)
    data = torch.utils.data.TensorDataset(x[ids], y[ids], ids)
    module, log = Slow(adamw, schedule), Log(num_peers)
    strategy = HivemindStrategy(
        target_batch_size=TARGET,
        run_id=f"parity{num_peers}{overlap}{transport}",
        initial_peers=bootstrap,
        transport=transport,
        matchmaking_time=3.0,
        overlap=overlap,
    )
    trainer = make_trainer(EPOCHS, [log], strategy, gradient_clip_val=CLIP)
    # Microbatches of another size on each peer.
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2 + index))
    result = {
        "epoch": strategy.swarm_epoch,
        "digest": strategy.params_digest(),
        "used": log.used,
        "lrs": module.lrs,
        "params": {name: value.tolist() for name, value in module.net.state_dict().items()},
        "rounds": [report_fields(report) for report in strategy.rounds],
    }
    out.write_text(json.dumps(result))
