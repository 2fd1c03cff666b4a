"""A miner for the tests of audited work: fits a small language model and writes down what a validator would see."""

import logging
import os
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from hivetrain.averaging.watch import RoundWatcher
from hivetrain.callbacks import ContributionPublisher, StopAtSwarmEpoch
from hivetrain.contribution.record import reveal_key, work_key
from hivetrain.contribution.rules import AuditRules
from hivetrain.data import RefinedWebDataModule
from hivetrain.demo.cheats import CheatingPublisher
from hivetrain.keys import Wallet
from hivetrain.model import CausalLM
from hivetrain.strategies import HivemindStrategy

RULES = AuditRules(probability=1.0, leaves=2, beacon_lag=3, reveal_blocks=16)
MINERS = 2
EPOCHS = 4


def small_model() -> CausalLM:
    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
    return CausalLM(config=config, vocab_size=4096, learning_rate=1e-2, warmup_epochs=1)


def small_data() -> RefinedWebDataModule:
    return RefinedWebDataModule(block_size=16, batch_size=4, n_slots=4)


class Witness(Callback):
    """Keeps the params of each epoch, the records as they were when a round began, and what was revealed at the end."""

    def __init__(self) -> None:
        self.seen, self.digests, self.params = {}, {}, {}

    def setup(self, trainer, pl_module, stage) -> None:
        witness, strategy = self, trainer.strategy

        class Watch(RoundWatcher):
            def on_commit(self, swarm_epoch, params_digest, samples):
                witness.seen[swarm_epoch] = strategy.collect(work_key(strategy.run_id, swarm_epoch), 10)
                witness.digests[swarm_epoch] = params_digest
                witness.params[swarm_epoch] = {name: value.clone() for name, value in pl_module.state_dict().items()}
                return b""

        strategy.watchers.append(Watch())

    def on_train_batch_start(self, trainer, *_) -> None:
        deadline = time.monotonic() + 60
        while trainer.global_step == 0 and trainer.strategy.num_peers < MINERS and time.monotonic() < deadline:
            time.sleep(0.02)

    def on_train_end(self, trainer, pl_module) -> None:
        strategy, deadline = trainer.strategy, time.monotonic() + 8
        while time.monotonic() < deadline:
            reveals = {epoch: strategy.collect(reveal_key(strategy.run_id, epoch), 10) for epoch in self.seen}
            if all(len(found) == MINERS for found in reveals.values()):
                break
            time.sleep(0.1)
        names = {param: name for name, param in pl_module.named_parameters()}
        done = [report for report in strategy.rounds if report.committed]
        self.found = {
            "seen": self.seen,
            "records": {epoch: strategy.collect(work_key(strategy.run_id, epoch), 10) for epoch in self.seen},
            "reveals": reveals,
            "params": self.params,
            "digests": self.digests,
            "order": [names[param] for param in strategy.trainable_params],
            "members": {
                report.swarm_epoch: [(member.peer_id, member.samples, member.commitment) for member in report.members]
                for report in done
            },
            "ways": {way for report in done for way in report.links.values()},
        }


def main(directory: str, name: str, kind: str | None, initial_peers: str, run_id: str, transport: str) -> None:
    os.setsid()
    log = os.open(f"{directory}/{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(1)
    chain, wallet = f"{directory}/ledger.db", Wallet(name, "hot", f"{directory}/wallets")
    place = (chain, wallet.name, wallet.hotkey, wallet.path, RULES)
    publisher = CheatingPublisher(kind, *place) if kind else ContributionPublisher(*place)
    witness = Witness()
    strategy = HivemindStrategy(
        target_batch_size=48, run_id=run_id, initial_peers=initial_peers, matchmaking_time=4, averaging_timeout=20,
        record_ttl=10, transport=transport,
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=-1, callbacks=[publisher, witness, StopAtSwarmEpoch(EPOCHS)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(small_model(), small_data())
    path = Path(directory, f"{name}.pt")
    torch.save(witness.found | {"uid": publisher.uid, "counts": publisher.counts.metrics()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
