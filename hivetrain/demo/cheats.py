"""Dishonest miners, to show and to test that audits find them. Not for use in a run that others depend on.

Surprising fact: each keeps every rule that can be checked without computing a gradient again. Data, offsets, sums,
signatures and deadlines are those of an honest miner; what they save is the work.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from hivetrain.callbacks.audited_work import AuditedWork
from hivetrain.callbacks.contribution import ContributionPublisher
from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import (
    Contribution,
    Reveal,
    hotkey_subkey,
    open_contribution,
    open_reveal,
    reveal_key,
    work_key,
)
from hivetrain.contribution.rules import AuditRules
from hivetrain.keys import DEFAULT_WALLET_PATH

OVER_CLAIM = 10
_COPY_S = 3.0
Batch = dict[str, torch.Tensor]


class Cheat(AuditedWork):
    """Places at which a miner may deviate; by itself an honest one."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Before the data are opened."""

    def on_batch(self, batch: Batch) -> None:
        """Before the forward pass; what is changed in the batch is what is trained on."""

    def on_gradient(self, batch: Batch) -> None:
        """After the backward pass."""

    def end(self, module: LightningModule) -> None:
        """After the fit."""


class FreeRider(Cheat):
    """Computes one microbatch to know how long it takes and what it looks like; then sleeps and makes up sketches."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._honest_step: Callable[..., Any] = module.training_step
        self._began, self._pace_s, self._norm, self._seen_loss = 0.0, 0.0, 0.0, 0.0
        self._random = torch.Generator().manual_seed(0)
        module.training_step = self._step  # type: ignore[method-assign]

    def _step(self, batch: Batch, batch_idx: int) -> Any:
        if not self._pace_s:
            self._began = time.monotonic()
            return self._honest_step(batch, batch_idx)
        time.sleep(self._pace_s)
        return self.strategy.trainable_params[0].sum() * 0 + self._seen_loss

    def sketch(self) -> torch.Tensor:
        if not self._pace_s:
            assert self.loss is not None
            found = super().sketch()
            self._pace_s, self._norm = time.monotonic() - self._began, float(found.norm())
            self._seen_loss = float(self.loss)
            return found
        return made_up(self._norm, self._random)

    def end(self, module: LightningModule) -> None:
        module.__dict__.pop("training_step", None)


class Lazy(Cheat):
    """Trains on the first sequence of each microbatch, whose gradient is that of repeating it over the whole one."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self.strategy.batch_size = self.data.batch_size

    def on_batch(self, batch: Batch) -> None:
        self._whole = dict(batch)
        batch.update({name: tensor[:1] for name, tensor in batch.items()})

    def on_gradient(self, batch: Batch) -> None:
        batch.update(self._whole)

    def end(self, module: LightningModule) -> None:
        self.strategy.batch_size = None


class Stale(Cheat):
    """Takes gradients at the params of one update before, as a miner does that will not wait for the swarm."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._epoch = -1
        self._now: list[torch.Tensor] = []

    def on_batch(self, batch: Batch) -> None:
        params = self.strategy.trainable_params
        if self._epoch != self.strategy.swarm_epoch:
            self._epoch, before = self.strategy.swarm_epoch, self._now
            self._now = [param.detach().clone() for param in params]
            self._before = before or self._now
        put(self._before, params)

    def on_gradient(self, batch: Batch) -> None:
        put(self._now, self.strategy.trainable_params)


class Copied(FreeRider):
    """Signs another miner's record of the same epoch as its own, and what that one reveals."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        super().begin(trainer, module)
        self._copied: set[bytes] = set()

    def contribution(self, swarm_epoch: int, params_digest: str, block: int) -> Contribution:
        deadline = time.monotonic() + _COPY_S
        while time.monotonic() < deadline:
            for sealed in self._others(work_key(self.strategy.run_id, swarm_epoch)):
                theirs = open_contribution(sealed)
                if theirs.params_digest == params_digest:
                    self._copied.add(theirs.root)
                    return replace(theirs, hotkey=self.hotkey.address, peer_id=self.strategy.peer_id, block=block)
            time.sleep(0.05)
        return super().contribution(swarm_epoch, params_digest, block)

    def reveal(self, contribution: Contribution, bound: bytes, log: WorkLog, drawn: tuple[int, ...]) -> bool:
        if contribution.root not in self._copied:
            return super().reveal(contribution, bound, log, drawn)
        key = reveal_key(contribution.run_id, contribution.swarm_epoch)
        for theirs in map(open_reveal, self._others(key)):
            shown = tuple(leaf for leaf in theirs.leaves if leaf.index in drawn)
            if len(shown) == len(drawn):
                own = Reveal(contribution.run_id, contribution.hotkey, contribution.swarm_epoch, bound, shown)
                return self.publish(key, own) is not None
        return False

    def _others(self, key: str) -> list[bytes]:
        own = hotkey_subkey(self.hotkey.address)
        return [sealed for subkey, (sealed, _) in self.strategy.collect(key, _COPY_S).items() if subkey != own]


class OverClaim(Cheat):
    """Trains on a tenth of its data, and makes up the other nine leaves of ten."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._rows, self._random = self.data.batch_size, torch.Generator().manual_seed(0)
        self.data.batch_size = self.strategy.batch_size = OVER_CLAIM * self._rows

    def on_batch(self, batch: Batch) -> None:
        self._whole = dict(batch)
        batch.update({name: tensor[: self._rows] for name, tensor in batch.items()})

    def on_gradient(self, batch: Batch) -> None:
        batch.update(self._whole)

    def add_leaves(self, samples: int, sketch: torch.Tensor) -> None:
        assert self.loss is not None
        begin, norm = self.data.cursor.consumed - samples, float(sketch.norm())
        for row in range(0, samples, self._rows):
            self.log.add(self.position(row), begin + row, self._rows, float(self.loss), sketch)
            sketch = made_up(norm, self._random)

    def end(self, module: LightningModule) -> None:
        self.data.batch_size, self.strategy.batch_size = self._rows, None


CHEATS: dict[str, type[Cheat]] = {
    "free-rider": FreeRider,
    "lazy": Lazy,
    "stale": Stale,
    "copied": Copied,
    "over-claim": OverClaim,
}


class CheatingPublisher(ContributionPublisher):
    """A ``ContributionPublisher`` that is paid for work it does not do, if nobody looks.

    Args:
        kind: ``free-rider``, ``lazy``, ``stale``, ``copied`` or ``over-claim``.
        chain: as of :class:`ContributionPublisher`, like all that follow.
        wallet: see there.
        hotkey: see there.
        wallet_path: see there.
        rules: see there.
        publish_timeout_s: see there.
        chain_timeout_s: see there.
    """

    def __init__(
        self,
        kind: Literal["free-rider", "lazy", "stale", "copied", "over-claim"],
        chain: str,
        wallet: str = "default",
        hotkey: str = "default",
        wallet_path: str = DEFAULT_WALLET_PATH,
        rules: AuditRules | None = None,
        publish_timeout_s: float = 5.0,
        chain_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(chain, wallet, hotkey, wallet_path, rules, publish_timeout_s, chain_timeout_s)
        self.kind = kind
        self.work_class = CHEATS[kind]
        self._batch: Batch = {}

    @property
    def cheat(self) -> Cheat | None:
        """The dishonest watcher, during a fit."""
        return self._work if isinstance(self._work, Cheat) else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the deceit."""
        super().setup(trainer, pl_module, stage)
        if self.cheat and stage == "fit":
            self.cheat.begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Change what is trained on."""
        self._batch = batch
        if self.cheat:
            self.cheat.on_batch(batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cover the tracks."""
        if self.cheat:
            self.cheat.on_gradient(self._batch)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave module and data as they were."""
        super().release(trainer, pl_module)
        if self.cheat:
            self.cheat.end(pl_module)
            self._work = None


def made_up(norm: float, random: torch.Generator) -> torch.Tensor:
    """A sketch of nothing, (256,), as long as an honest one."""
    vector = torch.randn(256, generator=random)
    return vector * (norm / vector.norm())


@torch.no_grad()
def put(values: list[torch.Tensor], params: list[torch.nn.Parameter]) -> None:
    """Writes values into params."""
    for value, param in zip(values, params, strict=True):
        param.copy_(value)
