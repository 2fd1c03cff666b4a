"""The language model: any causal transformer of ``transformers`` as a LightningModule.

Surprising fact: dropout is 0 unless asked for, whatever the architecture's own default (0.1 for GPT-2): a public text
corpus is never repeated often enough to overfit, and work without randomness can be recomputed by anyone.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from hivetrain.errors import UserError

Batch = Mapping[str, Tensor]
IGNORED = -100  # cross_entropy's default ignore_index


class CausalLM(LightningModule):
    """A causal transformer, its loss, and its optimizer.

    A batch is a mapping with ``input_ids`` (B, T) int64, optionally ``position_ids`` (B, T) and ``attention_mask``:
    (B, T), 0 at right padding, or (B, 1, T, T), true where a token may attend to another. Targets are the inputs
    shifted by one inside. Position ids that restart inside a row keep its documents apart, with or without such a mask.

    Args:
        model: An architecture known to ``transformers`` (``gpt2``, ``llama``, ...), built from its default config, or
            a local directory or hub name that holds a ``config.json``.
        pretrained: Load the params too (safetensors only); ``model`` is then a directory or hub name.
        config: Values of the architecture's config to override, such as ``n_layer`` or ``hidden_size``.
        vocab_size: Rows of the embedding; None keeps the architecture's. The data's vocabulary must fit in.
        dropout: Set for every kind of dropout the architecture has, unless ``config`` sets it.
        learning_rate: Peak learning rate, reached after warm-up.
        weight_decay: AdamW's decay of matrices; biases and norms are not decayed.
        betas: AdamW's moment decays.
        eps: AdamW's denominator offset.
        warmup_epochs: Number of swarm epochs over which the learning rate rises linearly.
        total_epochs: Swarm epoch at which the cosine reaches its floor; None keeps the peak rate after warm-up.
        min_lr_ratio: The floor, as a fraction of ``learning_rate``.

    Raises:
        UserError: If the architecture, a config value or the pretrained params cannot be used.
    """

    def __init__(
        self,
        model: str = "gpt2",
        pretrained: bool = False,
        config: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        dropout: float = 0.0,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        warmup_epochs: int = 10,
        total_epochs: int | None = None,
        min_lr_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        if total_epochs is not None and total_epochs <= warmup_epochs:
            raise UserError(f"total_epochs ({total_epochs}) must be greater than warmup_epochs ({warmup_epochs})")
        self.save_hyperparameters()
        overrides = dict(config or {})
        if vocab_size is not None:
            overrides["vocab_size"] = vocab_size
        architecture = _architecture(model, pretrained, overrides, dropout)
        self.lm: Any = _load(model, architecture) if pretrained else _build(architecture)
        if pretrained:  # a checkpoint must load where those files are not
            known = vars(AutoConfig.for_model(architecture.model_type))
            values = {name: value for name, value in architecture.to_diff_dict().items() if name in known}
            self.hparams.update(model=architecture.model_type, pretrained=False, config=values)
        self._val_loss = MeanMetric()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, vocab_size) of the next token at every position."""
        if position_ids is not None and attention_mask is not None and attention_mask.ndim == 2:
            # transformers separates packed documents by their positions only where no mask is given, and right
            # padding is invisible to a causal model anyway.
            attention_mask = None
        output = self.lm(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False)
        return output.logits

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy in nats of every predicted token, (B, T-1); 0 where the target is padding."""
        logits = self(batch["input_ids"], batch.get("position_ids"), batch.get("attention_mask"))
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), _targets(batch).flatten(), reduction="none")
        return losses.view(logits.shape[0], -1)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per predicted token, a scalar."""
        logits = self(batch["input_ids"], batch.get("position_ids"), batch.get("attention_mask"))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), _targets(batch).flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One microbatch: logs ``train/loss`` and ``train/perplexity``."""
        loss = self.loss(batch)
        size = batch["input_ids"].shape[0]
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/perplexity", loss.detach().exp(), batch_size=size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds one batch to ``val/loss``."""
        self._val_loss.update(self.loss(batch), batch["input_ids"].shape[0])

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/loss`` and ``val/perplexity``: the exponential of the mean, not the mean of exponentials."""
        self._log_held_out("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds one batch to ``test/loss``."""
        self._val_loss.update(self.loss(batch), batch["input_ids"].shape[0])

    def on_test_epoch_end(self) -> None:
        """Logs ``test/loss`` and ``test/perplexity``."""
        self._log_held_out("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """How surprising each row is: its mean cross-entropy in nats per predicted token, (B,)."""
        predicted = (_targets(batch) != IGNORED).sum(dim=1)
        return self.token_losses(batch).sum(dim=1) / predicted

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, temperature: float = 0.8, seed: int = 0) -> Tensor:
        """Continue each row of ``input_ids`` (B, T); temperature 0 takes the likeliest token.

        The random state of the process stays as it was, and so does the training mode of the model.
        """
        context = self.lm.config.max_position_embeddings
        was_training = self.lm.training
        self.lm.eval()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(seed)
                for _ in range(max_new_tokens):
                    logits = self(input_ids[:, -context:])[:, -1].float()
                    if temperature > 0:
                        chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1)
                    else:
                        chosen = logits.argmax(dim=-1, keepdim=True)
                    input_ids = torch.cat([input_ids, chosen], dim=1)
        finally:
            self.lm.train(was_training)
        return input_ids

    def setup(self, stage: str) -> None:
        """Refuse data that this model cannot read, before the first batch fails inside an embedding."""
        data = getattr(self.trainer, "datamodule", None)
        vocabulary_size, block_size = getattr(data, "vocabulary_size", None), getattr(data, "block_size", None)
        rows, context = self.lm.config.vocab_size, getattr(self.lm.config, "max_position_embeddings", None)
        if vocabulary_size is not None and vocabulary_size > rows:
            raise UserError(
                f"the data's vocabulary has {vocabulary_size} tokens, the model only {rows}: set model.vocab_size to "
                f"{vocabulary_size} or choose another tokenizer"
            )
        if block_size is not None and context is not None and block_size > context:
            raise UserError(
                f"data.block_size is {block_size}, the model's context only {context}: lower the block size or raise "
                "model.config.max_position_embeddings (n_positions for GPT-2)"
            )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with warm-up and cosine; the schedule advances once per optimizer step (a swarm epoch in a swarm)."""
        hparams = self.hparams
        optimizer = AdamW(
            decay_groups(self.named_parameters(), hparams["weight_decay"]),
            lr=hparams["learning_rate"],
            betas=tuple(hparams["betas"]),
            eps=hparams["eps"],
        )
        factor = partial(
            lr_factor,
            warmup_epochs=hparams["warmup_epochs"],
            total_epochs=hparams["total_epochs"],
            min_lr_ratio=hparams["min_lr_ratio"],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _log_held_out(self, split: str) -> None:
        mean = self._val_loss.compute()
        self._val_loss.reset()
        self.log(f"{split}/loss", mean, prog_bar=True)
        self.log(f"{split}/perplexity", mean.exp())


def lr_factor(swarm_epoch: int, warmup_epochs: int, total_epochs: int | None, min_lr_ratio: float) -> float:
    """Learning rate of the update that ends ``swarm_epoch``, as a fraction of the peak.

    Rises linearly from ``1 / warmup_epochs`` to 1, then follows a half cosine down to ``min_lr_ratio`` at
    ``total_epochs`` and stays there (SGDR, arXiv:1608.03983, without restarts).
    """
    if swarm_epoch < warmup_epochs:
        return (swarm_epoch + 1) / warmup_epochs
    if total_epochs is None:
        return 1.0
    progress = min(1.0, (swarm_epoch - warmup_epochs) / (total_epochs - warmup_epochs))
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices and embeddings decayed, biases and norms (all of one dimension) not.

    A tied param must come once, as ``Module.named_parameters`` gives it.
    """
    trained = [param for _, param in named_parameters if param.requires_grad]
    return [
        {"params": [param for param in trained if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in trained if param.ndim < 2], "weight_decay": 0.0},
    ]


def _targets(batch: Batch) -> Tensor:
    """What each position is to predict, (B, T-1): the next token, or IGNORED where that is padding."""
    targets = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    return targets if mask is None or mask.ndim != 2 else targets.masked_fill(mask[:, 1:] == 0, IGNORED)


def _architecture(model: str, pretrained: bool, overrides: dict[str, Any], dropout: float) -> Any:
    if pretrained or model not in CONFIG_MAPPING:
        try:
            architecture = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model {model!r} is neither an architecture of transformers nor a directory or hub name whose config "
                f"can be loaded: {_first_line(error)}"
            ) from error
    else:
        # Token ids of the published tokenizer mean nothing under another vocabulary.
        architecture = AutoConfig.for_model(model, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    known = set(vars(architecture)) | set(architecture.attribute_map)
    if "is_decoder" in known:
        architecture.is_decoder = True  # or BERT and its kin would attend to what they are to predict
    values = {name: dropout for name, value in vars(architecture).items() if "drop" in name and type(value) is float}
    for name, value in {**values, **overrides}.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"model.config: {model!r} has no option {name!r}{hint}")
        try:
            setattr(architecture, name, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise UserError(f"model.config.{name}: {' '.join(str(error).split())}") from error
    return architecture


def _build(architecture: Any) -> Any:
    try:
        return AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"cannot build a {architecture.model_type} causal model: {_first_line(error)}") from error


def _load(model: str, architecture: Any) -> Any:
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            model,
            config=architecture,
            dtype=torch.float32,  # the Trainer's precision decides what is computed in less
            trust_remote_code=False,
            use_safetensors=True,  # the other format is a pickle
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the params of {model!r}: {_first_line(error)}") from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise UserError(f"the files of {model!r} lack {len(absent)} of the model's params, such as {absent[0]}")
    return module.train()  # it comes in evaluation mode, in which dropout does nothing


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
