"""A swarm in one process: a real model on real data, whose params follow the honest miners' gradients alone.

Nobody's bytes travel: each attack meets the same trajectory of params, so their pay can be compared.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hivetrain.averaging.accumulator import GradientAccumulator
from hivetrain.averaging.state import params_digest
from hivetrain.contribution.record import Position
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import Sketcher, sketch_seed
from hivetrain.data import RefinedWebDataModule, SlotReader
from hivetrain.model import CausalLM

START = (0, 0, 0, 0)
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Economy:
    """Size of the simulated run.

    Args:
        rounds: global updates.
        tempo_rounds: updates between two settings of weights.
        honest: honest miners.
        microbatches: that an honest miner computes in a round.
        batch_size: blocks in a microbatch.
        block_size: tokens in a block.
        layers: of the model.
        width: of the model.
        learning_rate: its peak.
        blocks_per_round: blocks of the chain from one commitment to the next.
        seed: of params and of everything that the attackers invent.
        rules: of the audits.
    """

    rounds: int = 60
    tempo_rounds: int = 20
    honest: int = 6
    microbatches: int = 6
    batch_size: int = 2
    block_size: int = 64
    layers: int = 2
    width: int = 48
    learning_rate: float = 3e-3
    blocks_per_round: int = 40
    seed: int = 0
    rules: AuditRules = field(default_factory=AuditRules)
    run_id: str = "attacks"

    @property
    def samples(self) -> int:
        """Blocks that an honest miner computes in a round."""
        return self.microbatches * self.batch_size

    @property
    def target_batch_size(self) -> int:
        """Blocks in a global batch."""
        return self.honest * self.samples

    @property
    def max_samples(self) -> int:
        """What one peer counts for at most in an average: by default a quarter of the global batch."""
        return self.target_batch_size // 4


@dataclass(frozen=True)
class Microbatch:
    """One microbatch as its miner knows it.

    Attributes:
        position: of its first block.
        consumed: blocks of the slot's stream before it.
        loss: mean loss.
        gradient: mean gradient, (n,).
        sketch: of that gradient, (256,).
    """

    position: Position
    consumed: int
    loss: float
    gradient: Tensor
    sketch: Tensor


class Swarm:
    """Model, data and the current swarm epoch."""

    def __init__(self, economy: Economy) -> None:
        self.economy = economy
        self.data = RefinedWebDataModule(
            block_size=economy.block_size, batch_size=economy.batch_size, val_blocks=32 * economy.batch_size
        )
        self.data.setup("fit")
        self.reader = SlotReader.of(self.data, keep_units=64)
        with torch.random.fork_rng():
            torch.manual_seed(economy.seed)
            self.model = CausalLM(
                config={
                    "n_layer": economy.layers, "n_embd": economy.width, "n_head": 2, "n_positions": economy.block_size,
                },
                vocab_size=self.data.vocabulary_size, learning_rate=economy.learning_rate,
                warmup_epochs=5, total_epochs=max(6, economy.rounds),
            )  # fmt: skip
        configured: Any = self.model.configure_optimizers()
        self.optimizer, self._schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        self.params = [param for group in self.optimizer.param_groups for param in group["params"]]
        self._accumulator = GradientAccumulator(self.params)
        self._old: deque[list[Tensor]] = deque(maxlen=1)
        self.epoch = 0
        self._arrive()

    @property
    def theta(self) -> Tensor:
        """All params, (n,), in the order of gradients."""
        return torch.cat([param.detach().reshape(-1) for param in self.params])

    def work(self, slot: int, consumed: int, microbatches: int) -> list[Microbatch]:
        """Computes so many microbatches of a slot's stream, from ``consumed`` blocks after its start on."""
        size = self.economy.batch_size
        return [self.microbatch(slot, consumed + number * size) for number in range(microbatches)]

    def microbatch(self, slot: int, consumed: int) -> Microbatch:
        """Computes one microbatch on the current params; each only once, whoever asks."""
        key = slot, consumed
        if key not in self._done:
            batch, place = self.reader.batch(slot, START, consumed, self.economy.batch_size)
            loss, gradient = self.gradient(batch)
            sketch = self.sketcher.sketch_flat(gradient)
            self._done[key] = Microbatch(Position(*place), consumed, loss, gradient, sketch)
        return self._done[key]

    def gradient(self, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
        """Loss and mean gradient, (n,), of a batch on the current params."""
        loss = self.model.loss(batch)
        loss.backward()
        gradient = torch.cat([param.grad.reshape(-1) for param in self.params])
        self.optimizer.zero_grad()
        return loss.item(), gradient

    def stale_gradient(self, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
        """The same on the params of the epoch before, or on the first ones."""
        current = [param.detach().clone() for param in self.params]
        self._fill(self._old[0] if self._old else current)
        try:
            return self.gradient(batch)
        finally:
            self._fill(current)

    @torch.no_grad()
    def losses_at(self, theta: Tensor, blocks: Tensor) -> Tensor:
        """Loss of each block, (B,), at other params, (n,)."""
        current = [param.detach().clone() for param in self.params]
        sizes = [param.numel() for param in self.params]
        self._fill([part.view_as(param) for part, param in zip(theta.split(sizes), self.params, strict=True)])
        try:
            return self.model.token_losses({"input_ids": blocks}).mean(1)
        finally:
            self._fill(current)

    def advance(self, average: Tensor) -> None:
        """Ends the epoch: one optimizer step with the averaged gradient, (n,)."""
        self._old.append([param.detach().clone() for param in self.params])
        self._accumulator.put(average)
        torch.nn.utils.clip_grad_norm_(self.params, CLIP_NORM)
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()
        self.epoch += 1
        self._arrive()

    def held_out_loss(self) -> float:
        """Mean loss over some held-out blocks."""
        with torch.no_grad():
            losses = [self.model.loss(batch).item() for batch in self.data.val_dataloader()]
        return sum(losses) / len(losses)

    def _arrive(self) -> None:
        self.digest = params_digest(self.model)
        self.sketch_seed = sketch_seed(self.economy.run_id, self.epoch, self.digest)
        self.sketcher = Sketcher(self.sketch_seed, [param.numel() for param in self.params])
        self._done: dict[tuple[int, int], Microbatch] = {}

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for param, value in zip(self.params, values, strict=True):
            param.copy_(value)
