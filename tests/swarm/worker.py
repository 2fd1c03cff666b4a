"""A peer for the swarm tests: fits a small model with HivemindStrategy and writes what happened as JSON.

Usage: python worker.py '{"out": "...", ...}'; see ``DEFAULTS`` for the options.
"""

import functools
import hashlib
import json
import logging
import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from hivetrain.averaging import layout
from hivetrain.averaging.codecs import CODECS, Float32
from hivetrain.averaging.exchange import Exchange
from hivetrain.averaging.group import Matchmaker
from hivetrain.averaging.peer import SwarmPeer
from hivetrain.averaging.reduction import Reduction
from hivetrain.strategies import HivemindStrategy

layout.PART_ELEMENTS = PART_ELEMENTS = 2**17  # several parts also of what is small enough for a test

DEFAULTS = {
    "out": "",  # JSON file for the result
    "status": "",  # file that gets the epoch after each change
    "initial_peers": "",
    "transport": "auto",
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
    "peers": 1,  # wait for so many before the first batch
    "encode_s": None,  # a network this slow: seconds for each part sent
    "finish": "",  # file that names the last epoch, when ``epochs`` does not
    "release": "",  # file that lets a peer that has finished go, so that it serves those who have not
    "stage": "",  # file that gets what the network is at: "matchmaking", "exchange" or "training"
    "sabotage": None,  # what this peer does to exchanges, "garbage" or "stall", and a file: only while it is there
    "options": {},  # further arguments of the strategy
    "trainer": {},
}


class Regression(LightningModule):
    """A two-layer network on a fixed random regression task."""

    def __init__(self, width, lr, microbatch_s):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
        self.lr, self.microbatch_s, self.trained = lr, microbatch_s, 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.trained += len(x)
        time.sleep(self.microbatch_s)
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def make_data(seed, samples=100_000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x.sin().sum(dim=1, keepdim=True))


def write(path, text):
    """Replaces a file's text so that nobody reads half of it."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def tell_stages(path):
    """Keeps the file up to date with the stage of the round."""

    def told(function, stage):
        @functools.wraps(function)
        async def wrapper(*args, **kwargs):
            write(path, stage)
            try:
                return await function(*args, **kwargs)
            finally:
                write(path, "training")

        return wrapper

    Matchmaker.find = told(Matchmaker.find, "matchmaking")
    Exchange.run = told(Exchange.run, "exchange")


def sabotage(kind, sign):
    """Has this peer spoil every exchange, whatever it travels over, while a file is there."""
    outgoing, may_send = Reduction.outgoing, Reduction.may_send

    def garbage(self, member, index):
        data = outgoing(self, member, index)
        return os.urandom(len(data)) if os.path.exists(sign) else data

    def never(self, member, index):
        return not os.path.exists(sign) and may_send(self, member, index)

    if kind == "garbage":
        Reduction.outgoing = garbage
    else:
        assert kind == "stall", kind
        Reduction.may_send = never


def time_joining():
    """Returns a list that gets the seconds between the peer's arrival in the DHT and its admission or refusal."""
    taken, open_ = [], SwarmPeer.open

    @functools.wraps(open_)
    def wrapper(*args, **kwargs):
        start = time.monotonic()
        try:
            return open_(*args, **kwargs)
        finally:
            taken.append(time.monotonic() - start)

    SwarmPeer.open = wrapper
    return taken


def report_fields(report):
    """A round's report as JSON can hold it."""
    members = [vars(member) | {"commitment": member.commitment.hex()} for member in report.members]
    return vars(report) | {"outcome": str(report.outcome), "members": members}


class SlowFloat32(Float32):
    """The values as they are, after a while."""

    def __init__(self, encode_s):
        self.encode_s = encode_s

    def encode(self, values):
        if values.numel() == PART_ELEMENTS:  # a whole part
            time.sleep(self.encode_s)
        return super().encode(values)


def state_digest(optimizer):
    """SHA-256 of the optimizer's state."""
    sha = hashlib.sha256()
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            sha.update(key.encode() + torch.as_tensor(value).numpy().tobytes())
    return sha.hexdigest()


class Watch(Callback):
    """Stops at the last epoch and keeps the status file up to date."""

    def __init__(self, options):
        self.options, self.seen, self.stall_s, self.last, self.peer_id = options, -1, 0.0, None, ""

    def on_train_batch_start(self, trainer, *_):
        self.peer_id = trainer.strategy.peer_id
        self._wait(trainer, lambda: self.last is not None or trainer.strategy.num_peers >= self.options["peers"])

    def on_train_end(self, trainer, *_):
        self._wait(trainer, lambda: not self.options["release"] or os.path.exists(self.options["release"]))

    def _wait(self, trainer, condition):
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline and not trainer.received_sigterm:
            time.sleep(0.02)

    def on_train_batch_end(self, trainer, module, *_):
        now = time.monotonic()
        if self.last is not None:
            self.stall_s = max(self.stall_s, now - self.last)
        self.last = now
        epoch = trainer.strategy.swarm_epoch
        if self.options["status"] and epoch != self.seen:
            self.seen = epoch
            sizes = [report.group_size for report in trainer.strategy.rounds if report.committed]
            write(self.options["status"], json.dumps({"epoch": epoch, "group_size": sizes[-1] if sizes else 0}))
        finish = self.options["finish"]
        if finish and os.path.exists(finish):
            self.options["epochs"] = int(Path(finish).read_text())
        trainer.should_stop = epoch >= self.options["epochs"]


def main(given):
    options = DEFAULTS | given
    if options["stage"]:
        tell_stages(options["stage"])
    if options["sabotage"]:
        sabotage(*options["sabotage"])
    if options["encode_s"] is not None:
        CODECS["none"] = SlowFloat32(options["encode_s"])
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    torch.set_num_threads(1)
    seed_everything(options["seed"], verbose=False)
    module = Regression(options["width"], options["lr"], options["microbatch_s"])
    strategy = HivemindStrategy(
        target_batch_size=options["target"],
        run_id=options["run_id"],
        initial_peers=options["initial_peers"],
        transport=options["transport"],
        matchmaking_time=options["matchmaking"],
        averaging_timeout=options["timeout"],
        record_ttl=options["record_ttl"],
        **options["options"],
    )
    watch, joining = Watch(options), time_joining()
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, max_epochs=-1, callbacks=[watch], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options["trainer"],
    )  # fmt: skip
    losses, error = [], ""
    try:
        trainer.fit(module, DataLoader(make_data(options["data_seed"]), batch_size=options["batch"]))
    except BaseException as caught:
        error = f"{type(caught).__name__}: {caught}"
        raise
    finally:
        collaboration = strategy._collaboration
        result = {
            "error": error,
            "peer_id": watch.peer_id,
            "join_s": sum(joining),
            "trained": module.trained,
            "accumulated": collaboration.accumulator.samples if collaboration else 0,
            "optimizer": state_digest(strategy.optimizers[0]) if strategy.optimizers else "",
            "epoch": strategy.swarm_epoch,
            "digest": strategy.params_digest(),
            "samples": strategy.samples_contributed,
            "dropped": strategy.samples_dropped,
            "stall_s": watch.stall_s,
            "losses": losses,
            "rounds": [report_fields(report) for report in strategy.rounds],
        }
        Path(options["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
