"""``RefinedWebDataModule``: a miner's endless training stream and the held-out blocks, for Lightning.

The surprising fact: which blocks come is settled by public facts alone (corpus, vocabulary, seed, slot), so the module
draws no random number, and anybody can compute the same stream.
"""

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from hivetrain.data.assignment import DEFAULT_SLOTS, DataAssignment, slot_of_peer
from hivetrain.data.cache import TokenCache
from hivetrain.data.corpus import Corpus, EmbeddedCorpus
from hivetrain.data.encoding import Encoder, data_digest, load_encoder
from hivetrain.data.errors import DataError
from hivetrain.data.packing import document_mask, document_positions
from hivetrain.data.stream import Batch, BlockAddress, Cursor, SlotStream, UnitBlocks, to_ids, unit_loader

logger = logging.getLogger(__name__)


class RefinedWebDataModule(pl.LightningDataModule):
    """Packed blocks of text: batches are ``{"input_ids": (B, T) int64}``; labels are the same ids.

    Args:
        corpus: Where the text comes from; None is ``EmbeddedCorpus()``.
        tokenizer: ``embedded``, ``gpt2``, the path of a ``tokenizer.json``, or ``owner/name@commit`` on the hub.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch.
        num_workers: Processes that read and tokenize ahead; any number gives the same stream.
        seed: Seed of the assignment. All miners of a run must have the same.
        slot: Which share of the data is ours: the uid on a chain. None takes a hash of the strategy's ``peer_id``.
        n_slots: Number of shares. None is 256, or as many as a small corpus can fill. The same for all miners of a run.
        units_per_window: Units that a slot has in one window. The same for all miners of a run.
        isolate_documents: Start positions again at each document and let no token attend to another document; batches
            then have ``position_ids`` (B, T) and ``attention_mask`` (B, 1, T, T) too.
        val_blocks: Use only the first so many held-out blocks for validation; None uses all.
        eos_token: The tokenizer's end-of-text token, where its name is not a common one.
        cache_dir: Keep the tokens of training units here for later passes and restarts; None keeps none.
        cache_limit_mb: Most megabytes of tokens to keep; the units not used for longest go first.
    """

    def __init__(
        self,
        corpus: Corpus | None = None,
        tokenizer: str = "embedded",
        block_size: int = 512,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        slot: int | None = None,
        n_slots: int | None = None,
        units_per_window: int = 1,
        isolate_documents: bool = False,
        val_blocks: int | None = None,
        eos_token: str | None = None,
        cache_dir: str | None = None,
        cache_limit_mb: int = 4096,
    ) -> None:
        super().__init__()
        for name, value in (("block_size", block_size), ("batch_size", batch_size), ("val_blocks", val_blocks)):
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, not {value}")
        self.corpus = corpus if corpus is not None else EmbeddedCorpus()
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.slot = slot
        self.n_slots = n_slots
        self.units_per_window = units_per_window
        self.isolate_documents = isolate_documents
        self.val_blocks = val_blocks
        self.eos_token = eos_token
        self._cache = TokenCache(cache_dir, cache_limit_mb * 1_000_000) if cache_dir else None
        self._stream: SlotStream | None = None
        self._restored: Mapping[str, Any] | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer; loaded on first use."""
        return load_encoder(self.tokenizer, self.eos_token)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, for the model's embedding. Loads the tokenizer, nothing else."""
        return self.encoder.vocabulary_size

    @cached_property
    def assignment(self) -> DataAssignment:
        """The public assignment in data pass 0. Loads the manifest and the tokenizer."""
        n_units = self.corpus.manifest.n_train_units
        n_slots = self.n_slots
        if n_slots is None:
            n_slots = min(DEFAULT_SLOTS, max(n_units // self.units_per_window, 1))
        return DataAssignment(
            digest=data_digest(self.corpus.manifest.digest, self.encoder, self.block_size),
            n_units=n_units,
            seed=self.seed,
            n_slots=n_slots,
            units_per_window=self.units_per_window,
        )

    @property
    def units(self) -> UnitBlocks:
        """Makes the blocks of a unit, as training gets them."""
        return UnitBlocks(self.corpus, self.encoder, self.block_size, self._cache)

    @property
    def cursor(self) -> Cursor:
        """The next block that will be trained on."""
        return self._stream.cursor if self._stream else Cursor()

    @property
    def consumed_addresses(self) -> tuple[BlockAddress, ...]:
        """The blocks of the batch that was last taken for training."""
        return self._stream.addresses if self._stream else ()

    def collate(self, blocks: torch.Tensor) -> Batch:
        """The batch that training gets for these blocks, (B, T) int64."""
        if not self.isolate_documents:
            return {"input_ids": blocks}
        positions = document_positions(blocks, self.encoder.eos_id)
        return {"input_ids": blocks, "position_ids": positions, "attention_mask": document_mask(positions)}

    def setup(self, stage: str) -> None:
        """Open corpus and tokenizer, so that whatever is wrong with them is said before training."""
        assignment = self.assignment
        logger.info(
            "data %s: %d training units, %d held out, %d slots, %d windows in a pass",
            assignment.digest[:12],
            assignment.n_units,
            self.corpus.manifest.heldout_units,
            assignment.n_slots,
            assignment.n_windows,
        )

    def train_dataloader(self) -> SlotStream:
        """The endless stream of this miner's slot, from the cursor on."""
        slot = self._own_slot()
        self._stream = SlotStream(
            self.units,
            self.assignment,
            slot,
            self._start(slot),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate=self.collate,
            consume_on_yield=self.trainer is None,
        )
        return self._stream

    def val_dataloader(self) -> "DataLoader[torch.Tensor] | list[Any]":
        """The held-out blocks, in order, the same for every miner; the last batch may be smaller."""
        if not self.corpus.manifest.heldout_units:
            if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
                raise DataError("the corpus holds no units out for validation: set its heldout_units.")
            logger.warning("no validation: the corpus holds no units out (heldout_units)")
            return []
        return DataLoader(
            self._heldout_blocks,  # type: ignore[arg-type]  # a tensor is a sequence of its rows
            batch_size=self.batch_size,
            collate_fn=self._collate_rows,
            generator=torch.Generator(),
        )

    def test_dataloader(self) -> "DataLoader[torch.Tensor] | list[Any]":
        """The same as for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> "DataLoader[torch.Tensor] | list[Any]":
        """The same as for validation."""
        return self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """Release the cache's file."""
        if self._cache is not None:
            self._cache.close()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning hands over each batch right before it is used: a training batch counts as consumed here."""
        if self._stream is not None and self.trainer is not None and self.trainer.training:
            self._stream.consume()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what it belongs to; goes into Lightning's checkpoint."""
        if self._stream is None:
            return dict(self._restored or {})
        return {**self._facts(), "slot": self._stream.slot, **self._stream.cursor.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the cursor of a checkpoint; checked against our data when the stream is made."""
        self._restored = dict(state_dict)
        self._stream = None

    def _facts(self) -> dict[str, Any]:
        facts = self.assignment
        return {
            "digest": facts.digest,
            "seed": facts.seed,
            "n_slots": facts.n_slots,
            "units_per_window": facts.units_per_window,
        }

    def _start(self, slot: int) -> Cursor:
        """Where to begin: at the stream's own cursor, at a checkpoint's, or at the very start."""
        if self._stream is not None and self._stream.slot == slot:
            return self._stream.cursor
        state = self._restored
        if not state:
            return Cursor()
        for name, ours in self._facts().items():
            if state.get(name) != ours:
                raise DataError(
                    f"the checkpoint belongs to other data: its {name} is {state.get(name)!r}, ours is {ours!r}. "
                    "Use what it was made with: corpus, tokenizer, block_size, seed, n_slots, units_per_window."
                )
        cursor = Cursor(**{name: int(state[name]) for name in Cursor().to_dict()})
        if state["slot"] != slot:
            logger.warning(
                "the checkpoint is of slot %d, we are slot %d: starting at our own units of window %d",
                state["slot"],
                slot,
                cursor.window,
            )
            return Cursor(cursor.data_pass, cursor.window, consumed=cursor.consumed)
        return cursor

    def _own_slot(self) -> int:
        if self.slot is not None:
            return self.slot
        strategy = getattr(self.trainer, "strategy", None)
        if strategy is None or not hasattr(strategy, "peer_id"):
            logger.info("no slot given and the strategy has no peer_id: reading slot 0")
            return 0
        peer_id = strategy.peer_id
        if peer_id is None:
            # Slot 0 here would give every miner of a swarm the same data.
            raise DataError("the strategy has no peer_id before it has joined the swarm: set slot, or join first.")
        slot = slot_of_peer(str(peer_id), self.assignment.n_slots)
        logger.info("slot %d of %d, from a hash of peer id %s", slot, self.assignment.n_slots, peer_id)
        return slot

    @cached_property
    def _heldout_blocks(self) -> torch.Tensor:
        manifest = self.corpus.manifest
        units = UnitBlocks(self.corpus, self.encoder, self.block_size)
        rows, count = [], 0
        for blocks in unit_loader(units, range(manifest.n_train_units, manifest.n_units), num_workers=0):
            if isinstance(blocks, DataError):
                raise blocks
            rows.append(blocks)
            count += len(blocks)
            if self.val_blocks is not None and count >= self.val_blocks:
                break
        if not count:
            raise DataError(f"no held-out unit holds a full block of {self.block_size} tokens: lower block_size.")
        return to_ids(rows)[: self.val_blocks]

    def _collate_rows(self, rows: list[torch.Tensor]) -> Batch:
        return self.collate(torch.stack(rows))
