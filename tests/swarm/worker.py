"""A peer for the swarm tests: fits a small model with HivemindStrategy and writes what happened as JSON.

Usage: python worker.py '{"out": "...", ...}'; see ``DEFAULTS`` for the options.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from hivetrain.strategies import HivemindStrategy

DEFAULTS = {
    "out": "",  # JSON file for the result
    "status": "",  # file that gets the epoch after each change
    "initial_peers": "",
    "run_id": "test",
    "epochs": 5,
    "target": 32,
    "batch": 4,
    "seed": 0,  # of the model
    "data_seed": 0,  # of this peer's data
    "microbatch_s": 0.05,
    "matchmaking": 3.0,
    "timeout": 20.0,
    "record_ttl": 10.0,
    "width": 8,
    "lr": 0.01,
    "options": {},  # further arguments of the strategy
    "trainer": {},
}


class Regression(LightningModule):
    """A two-layer network on a fixed random regression task."""

    def __init__(self, width, lr, microbatch_s):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
        self.lr, self.microbatch_s = lr, microbatch_s

    def training_step(self, batch, batch_idx):
        x, y = batch
        time.sleep(self.microbatch_s)
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def make_data(seed, samples=100_000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x.sin().sum(dim=1, keepdim=True))


class Watch(Callback):
    """Stops at the last epoch and keeps the status file up to date."""

    def __init__(self, epochs, status):
        self.epochs, self.status, self.seen, self.stall_s, self.last = epochs, status, -1, 0.0, None

    def on_train_batch_end(self, trainer, module, *_):
        now = time.monotonic()
        if self.last is not None:
            self.stall_s = max(self.stall_s, now - self.last)
        self.last = now
        epoch = trainer.strategy.swarm_epoch
        if self.status and epoch != self.seen:
            self.seen = epoch
            temporary = Path(f"{self.status}.tmp")
            temporary.write_text(json.dumps({"epoch": epoch, "digest": trainer.strategy.params_digest()}))
            os.replace(temporary, self.status)
        trainer.should_stop = epoch >= self.epochs


def main():
    options = DEFAULTS | json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    torch.set_num_threads(1)
    seed_everything(options["seed"], verbose=False)
    module = Regression(options["width"], options["lr"], options["microbatch_s"])
    strategy = HivemindStrategy(
        target_batch_size=options["target"],
        run_id=options["run_id"],
        initial_peers=options["initial_peers"],
        matchmaking_time=options["matchmaking"],
        averaging_timeout=options["timeout"],
        record_ttl=options["record_ttl"],
        **options["options"],
    )
    watch = Watch(options["epochs"], options["status"])
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=-1, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options["trainer"],
    )  # fmt: skip
    losses = []
    try:
        trainer.fit(module, DataLoader(make_data(options["data_seed"]), batch_size=options["batch"]))
    finally:
        result = {
            "epoch": strategy.swarm_epoch,
            "digest": strategy.params_digest(),
            "samples": strategy.samples_contributed,
            "dropped": strategy.samples_dropped,
            "stall_s": watch.stall_s,
            "losses": losses,
            "rounds": [vars(r) | {"outcome": str(r.outcome)} for r in strategy.rounds],
        }
        Path(options["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
