"""Save and resume: nothing of a run is lost or done twice, and the newer of disk and peers wins."""

import pytest
import torch
import worker
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from peers import assert_ways, wait_until
from solo import Module, OnBatch, distance, fit, loader, make_trainer
from worker import report_fields

from hivetrain.averaging.state import params_digest
from hivetrain.callbacks import StopAtSwarmEpoch, SwarmCheckpoint
from hivetrain.data import RefinedWebDataModule
from hivetrain.model import CausalLM
from hivetrain.strategies import HivemindStrategy

MICROBATCHES = 4  # in a swarm epoch


class Run:
    """A tiny language model on the embedded corpus, and what it saw and did on each microbatch."""

    def __init__(self, overlap=False):
        self.overlap, self.losses, self.blocks, self.lrs = overlap, [], [], []
        self.data = RefinedWebDataModule(block_size=16, batch_size=2, slot=1)
        config = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
        torch.manual_seed(0)
        vocabulary = self.data.vocabulary_size
        self.model = CausalLM(config=config, vocab_size=vocabulary, warmup_epochs=3, total_epochs=9, learning_rate=1e-2)

    def fit(self, epochs=None, ckpt_path=None, callbacks=(), **arguments):
        strategy = HivemindStrategy(2 * MICROBATCHES, initial_peers="", overlap=self.overlap)
        self.trainer = fit(
            self.model, self.data, epochs, ckpt_path,
            strategy=strategy, callbacks=[OnBatch(self.note), *callbacks], limit_val_batches=0, **arguments,
        )  # fmt: skip
        return self

    def note(self, trainer):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.blocks.append(self.data.consumed_addresses)
        self.lrs.append((trainer.strategy.swarm_epoch, trainer.optimizers[0].param_groups[0]["lr"]))

    @property
    def moments(self):
        return [entry[key] for entry in self.trainer.optimizers[0].state.values() for key in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize(("taken_at", "overlap"), [(20, False), (18, False), (18, True)])
def test_ten_epochs_equal_some_and_a_resume(taken_at, overlap, tmp_path):
    whole = Run(overlap).fit(10)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=taken_at, save_top_k=-1)
    Run(overlap).fit(callbacks=[saver], max_steps=25, enable_checkpointing=True)  # goes on after the checkpoint
    resumed = Run(overlap).fit(10, tmp_path / f"step={taken_at}.ckpt")
    assert resumed.trainer.strategy.swarm_epoch == 10
    assert resumed.trainer.global_step == whole.trainer.global_step == 10 * MICROBATCHES
    assert resumed.blocks == whole.blocks[taken_at:]
    assert resumed.lrs == whole.lrs[taken_at:]
    assert resumed.losses == pytest.approx(whole.losses[taken_at:], abs=1e-6)
    assert distance(resumed.model, whole.model) < 1e-6
    for ours, theirs in zip(resumed.moments, whole.moments, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert resumed.trainer.strategy.samples_contributed == 10 * 2 * MICROBATCHES


def test_callbacks_know_the_epoch_of_a_checkpoint_before_the_first_microbatch(tmp_path):
    saver = SwarmCheckpoint(tmp_path, every_n_epochs=2)
    fit(Module(), loader(), 4, callbacks=[saver], enable_checkpointing=True)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-00000002.ckpt", "epoch-00000004.ckpt"]
    module = Module()
    trainer = make_trainer(callbacks=[StopAtSwarmEpoch(4)])
    trainer.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.strategy.swarm_epoch == 4
    assert len(module.losses) <= 1


def test_a_checkpoint_that_was_validated_is_not_resumed_by_the_next_fit(tmp_path):
    trainer = fit(Module(), loader(), 3)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    module, seen = Module(), []
    trainer = make_trainer(1, callbacks=[OnBatch(lambda trainer: seen.append(trainer.strategy.swarm_epoch))])
    trainer.validate(module, loader(8), ckpt_path=tmp_path / "old.ckpt", verbose=False)
    trainer.fit(module, loader())
    assert seen == [0, 1]


def test_a_checkpoint_of_plain_lightning_starts_a_swarm_at_epoch_0_with_its_params(tmp_path):
    class Plain(Module):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    def decaying(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    plain, path = Plain(make_scheduler=decaying, scheduler={"interval": "step"}), tmp_path / "plain.ckpt"
    trainer = fit(plain, loader(), strategy="auto", max_steps=3)
    trainer.save_checkpoint(path)
    module, digests = Module(make_scheduler=decaying), []
    note = OnBatch(lambda trainer: digests.append((trainer.strategy.swarm_epoch, trainer.strategy.params_digest())))
    fit(module, loader(), 1, path, callbacks=[note])
    assert [epoch for epoch, _ in digests] == [0, 1]
    assert module.lrs == [(0, 0.01), (0, 0.01)]  # as on the peers that have no such checkpoint
    assert digests[0][1] == params_digest(plain)  # the first microbatch moves nothing


# Disk and peers


def fit_peer(swarm, epochs, ckpt_path=None, callbacks=(), alone=False):
    """The model of ``worker.py``, in this process."""
    seed_everything(0, verbose=False)
    module = worker.Regression(8, 0.01, 0.0)
    peers = "" if alone else swarm.common["initial_peers"]
    way = swarm.common["transport"]
    strategy = HivemindStrategy(32, swarm.common["run_id"], peers, matchmaking_time=3.0, record_ttl=10.0, transport=way)
    data = torch.utils.data.DataLoader(worker.make_data(7), batch_size=4)
    return fit(module, data, epochs, ckpt_path, strategy=strategy, callbacks=callbacks)


@pytest.mark.parametrize("newer", ["peers", "disk"])
def test_the_newer_of_disk_and_peers_wins(newer, swarm, tmp_path):
    own_epoch = 2 if newer == "peers" else 300
    alone = fit_peer(swarm, own_epoch, alone=True)
    alone.save_checkpoint(tmp_path / "own.ckpt")
    donor = swarm.start("donor", epochs=10**6, microbatch_s=0.05)
    swarm.wait_for_epoch(4, donor)
    epochs = []
    note = OnBatch(lambda trainer: epochs.append(trainer.strategy.swarm_epoch))

    def stop(trainer):
        trainer.should_stop = any(report.outcome == "averaged" for report in trainer.strategy.rounds)

    trainer = fit_peer(swarm, None, tmp_path / "own.ckpt", [note, OnBatch(stop)])
    if newer == "peers":
        assert epochs[0] >= 4
    else:
        assert epochs[0] >= 300
        wait_until(lambda: donor.epoch >= 300, 30, "the donor catches up", swarm.peers)
    assert trainer.strategy.rounds[-1].group_size == 2
    assert_ways([report_fields(report) for report in trainer.strategy.rounds], swarm.common["transport"])
