"""A look at what the model writes by now."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hivetrain.callbacks.swarm_view import swarm_epoch
from hivetrain.errors import UserError

logger = logging.getLogger(__name__)


class GenerationSample(Callback):
    """Logs a continuation of a prompt every few swarm epochs and at the end.

    The model must be a ``CausalLM`` (it needs ``generate``), and the data module must have an ``encoder`` with
    ``encode`` and ``decode``.

    Args:
        prompt: Text to continue.
        every_n_epochs: Swarm epochs from one sample to the next.
        max_new_tokens: Length of the continuation.
        temperature: 0 takes the likeliest token each time.
        seed: Makes the samples of two epochs differ by the model alone.
    """

    def __init__(
        self,
        prompt: str = "The",
        every_n_epochs: int = 10,
        max_new_tokens: int = 40,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        if every_n_epochs < 1 or not prompt:
            raise UserError("sample.every_n_epochs must be at least 1 and sample.prompt not empty")
        self.prompt = prompt
        self.every_n_epochs = every_n_epochs
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self._sampled_epoch: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model or a data module that cannot do it."""
        self._sampled_epoch = None
        if not callable(getattr(pl_module, "generate", None)):
            raise UserError(f"sample needs a model with generate(), such as CausalLM; got {type(pl_module).__name__}")
        encoder = _encoder(trainer)
        if not (hasattr(encoder, "encode") and hasattr(encoder, "decode")):
            raise UserError("sample needs a data module with an encoder (encode and decode): remove the key or use one")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the swarm epoch at which this run begins; a strategy restores it after ``on_train_start``."""
        if self._sampled_epoch is None:
            self._sampled_epoch = swarm_epoch(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample if a multiple of ``every_n_epochs`` was reached or passed."""
        assert self._sampled_epoch is not None
        if swarm_epoch(trainer) // self.every_n_epochs > self._sampled_epoch // self.every_n_epochs:
            self.sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample from the final model."""
        if swarm_epoch(trainer) != self._sampled_epoch:
            self.sample(trainer, pl_module)

    def sample(self, trainer: Trainer, pl_module: Any) -> str:
        """Continue the prompt, log the text and return it."""
        self._sampled_epoch = swarm_epoch(trainer)
        encoder = _encoder(trainer)
        tokens = encoder.encode([self.prompt])[0].tolist()
        prompt = torch.tensor([tokens], dtype=torch.long, device=pl_module.device)
        with trainer.precision_plugin.forward_context():
            written = pl_module.generate(prompt, self.max_new_tokens, temperature=self.temperature, seed=self.seed)
        text = encoder.decode(written[0].tolist())
        logger.info("sample at swarm epoch %d: %s", self._sampled_epoch, text)
        return text


def _encoder(trainer: Trainer) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "encoder", None)
