"""A swarm of one in the test's own process, a small module to fit in it, and the same training written out in torch."""

import contextlib
import socket
import warnings
from multiprocessing.process import BaseProcess

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from hivetrain.callbacks import StopAtSwarmEpoch
from hivetrain.strategies import HivemindStrategy

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def samples(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, x.sin().sum(dim=1, keepdim=True)


def loader(count=256, batch_size=4, seed=1):
    return DataLoader(TensorDataset(*samples(count, seed)), batch_size=batch_size)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)


def sgd(params):
    return torch.optim.SGD(params, lr=0.2)


class Module(LightningModule):
    """Regression. ``make_scheduler`` takes the optimizer; ``scheduler`` adds keys to Lightning's dict."""

    def __init__(self, make_optimizer=adamw, make_scheduler=None, scheduler=None):
        super().__init__()
        self.net, self.scheduler = net(), scheduler or {}
        self.make_optimizer, self.make_scheduler = make_optimizer, make_scheduler
        self.losses, self.lrs, self.updates = [], [], 0

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x.to(self.dtype)), y.to(self.dtype))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.lrs.append((self.trainer.strategy.swarm_epoch, self.optimizers().param_groups[0]["lr"]))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def on_before_optimizer_step(self, optimizer):
        self.updates += 1

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), **self.scheduler}}


def make_trainer(epochs=None, callbacks=(), strategy=None, target=8, **arguments):
    """A Trainer in a swarm of its own that stops at a swarm epoch."""
    stop = [StopAtSwarmEpoch(epochs)] if epochs else []
    if strategy is None:
        strategy = HivemindStrategy(target_batch_size=target, initial_peers="")
    defaults = {"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0, **QUIET}
    return Trainer(strategy=strategy, callbacks=[*callbacks, *stop], **(defaults | arguments))


def fit(module, data, epochs=None, ckpt_path=None, **arguments):
    """Fits and returns the Trainer."""
    trainer = make_trainer(epochs, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def reference(batches, make_optimizer=adamw, make_scheduler=None, clip=None):
    """Plain torch: one step for each batch (x, y). Returns the net, the losses and the learning rates."""
    model, losses, lrs = net(), [], []
    optimizer = make_optimizer(model.parameters())
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    for x, y in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        losses.append(float(loss.detach()))
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model, losses, lrs


def distance(a, b):
    """Largest difference of any param."""
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


class OnBatch(Callback):
    """Calls a function with the trainer after each microbatch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, *_):
        self.function(trainer)


@contextlib.contextmanager
def no_network(monkeypatch):
    """Fails whoever connects, listens, or starts a process (the DHT is one)."""

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    with monkeypatch.context() as patch:
        for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(BaseProcess, "start", refuse)
        yield
