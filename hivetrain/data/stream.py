"""The stream of one slot: unit after unit, window after window, pass after pass, in batches of blocks.

The surprising fact: the cursor moves when a batch is taken for training, not when it is made. Whatever Lightning or the
workers have fetched ahead is made again after a resume, so nothing is lost and nothing comes twice.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from hivetrain.data.assignment import DataAssignment
from hivetrain.data.cache import TokenCache
from hivetrain.data.corpus import Corpus
from hivetrain.data.encoding import Encoder
from hivetrain.data.errors import DataError
from hivetrain.data.packing import Tokens, cut_blocks, join_documents

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BlockAddress:
    """Where a block stands: number ``k`` of a unit, and the pass and window in which its slot reads that unit."""

    data_pass: int
    window: int
    unit: int
    k: int


@dataclass(frozen=True)
class Cursor:
    """The next block of a slot's stream.

    Args:
        data_pass: Pass over the data.
        window: Window in the pass.
        place: Which of the slot's units in the window.
        block: Number of the block in that unit; may be one past the last.
        consumed: Blocks consumed since the start of training.
    """

    data_pass: int = 0
    window: int = 0
    place: int = 0
    block: int = 0
    consumed: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class UnitBlocks(Dataset[torch.Tensor | DataError]):
    """All blocks of a unit, (blocks, T): read, encoded, packed.

    An error is returned, not raised, to cross processes unchanged. Blocks cross as a tensor, in shared memory: an array
    would fill the pipe, and a worker that waits at a full pipe never learns that its parent was killed.
    """

    def __init__(self, corpus: Corpus, encoder: Encoder, block_size: int, cache: TokenCache | None = None) -> None:
        self.corpus = corpus
        self.encoder = encoder
        self.block_size = block_size
        self.cache = cache

    def __getitem__(self, unit: int) -> torch.Tensor | DataError:
        try:
            blocks = cut_blocks(self._tokens(unit), self.block_size)
            return torch.from_numpy(blocks.copy())
        except DataError as error:
            return error

    def _tokens(self, unit: int) -> Tokens:
        if self.cache is None:
            return unit_tokens(self.corpus, self.encoder, unit)
        name = f"{self.corpus.manifest.digest} {self.encoder.vocabulary_sha256} {self.encoder.eos_id}"
        tokens = self.cache.get(name, unit)
        if tokens is None:
            tokens = unit_tokens(self.corpus, self.encoder, unit)
            self.cache.put(name, unit, tokens)
        return tokens


def unit_tokens(corpus: Corpus, encoder: Encoder, unit: int) -> Tokens:
    """All tokens of a unit, each document followed by one end-of-text."""
    return join_documents(encoder.encode(corpus.read_unit(unit)), encoder.eos_id, encoder.vocabulary_size)


class SlotStream:
    """Endless batches of one slot; iterating begins at the cursor.

    Args:
        units: Makes the blocks of a unit.
        assignment: Of the cursor's data pass or any other; later passes follow from it.
        slot: Whose units.
        cursor: Where to begin.
        batch_size: Blocks in a batch.
        num_workers: Processes that prepare units; any number gives the same stream.
        collate: Makes a batch of a (B, T) int64 tensor.
        consume_on_yield: Count a batch as consumed when it is yielded. Otherwise somebody calls ``consume`` for each.
    """

    def __init__(
        self,
        units: UnitBlocks,
        assignment: DataAssignment,
        slot: int,
        cursor: Cursor,
        batch_size: int,
        num_workers: int,
        collate: Callable[[torch.Tensor], Batch],
        consume_on_yield: bool,
    ) -> None:
        self.units = units
        self.assignment = assignment
        self.slot = slot
        self.cursor = cursor
        self.addresses: tuple[BlockAddress, ...] = ()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.collate = collate
        self.consume_on_yield = consume_on_yield
        self._ahead: deque[tuple[Cursor, tuple[BlockAddress, ...]]] = deque()

    def consume(self) -> None:
        """Move the cursor behind the oldest batch that was yielded and not yet consumed."""
        self.cursor, self.addresses = self._ahead.popleft()

    def __iter__(self) -> Iterator[Batch]:
        self._ahead.clear()
        rows: list[torch.Tensor] = []
        addresses: list[BlockAddress] = []
        consumed = self.cursor.consumed
        for at, unit, blocks in self._located_units():
            taken = at.block
            while taken < len(blocks):
                part = blocks[taken : taken + self.batch_size - len(addresses)]
                rows.append(part)
                addresses += [BlockAddress(at.data_pass, at.window, unit, taken + i) for i in range(len(part))]
                taken += len(part)
                if len(addresses) == self.batch_size:
                    consumed += self.batch_size
                    after = Cursor(at.data_pass, at.window, at.place, taken, consumed)
                    self._ahead.append((after, tuple(addresses)))
                    if self.consume_on_yield:
                        self.consume()
                    yield self.collate(to_ids(rows))
                    rows, addresses = [], []

    def _located_units(self) -> Iterator[tuple[Cursor, int, torch.Tensor]]:
        """Units with their blocks, each at the cursor of its first block to be used."""
        start = self.cursor
        barren = 0
        for (at, unit), blocks in zip(
            places(self.assignment, self.slot, start), self._unit_loader(start), strict=False
        ):
            if isinstance(blocks, DataError):
                raise blocks
            barren = 0 if len(blocks) else barren + 1
            if barren > self.assignment.n_windows * self.assignment.units_per_window:
                raise DataError(f"no unit holds a full block of {self.units.block_size} tokens: lower block_size.")
            yield at, unit, blocks

    def _unit_loader(self, start: Cursor) -> DataLoader[torch.Tensor | DataError]:
        return unit_loader(self.units, _Numbers(self.assignment, self.slot, start), self.num_workers)


def places(assignment: DataAssignment, slot: int, start: Cursor) -> Iterator[tuple[Cursor, int]]:
    """The units of a slot's stream without end, each at the cursor of its first block to be used."""
    assignment = assignment.at_pass(start.data_pass)
    window, place, block = start.window, start.place, start.block
    while True:
        while window < assignment.n_windows:
            for i, unit in enumerate(assignment.units(window, slot)):
                if i >= place:
                    yield Cursor(assignment.data_pass, window, i, block), unit
                    block = 0
            window, place = window + 1, 0
        assignment, window = assignment.at_pass(assignment.data_pass + 1), 0


class _Numbers:
    """The unit numbers of a stream, as the sampler of a DataLoader."""

    def __init__(self, assignment: DataAssignment, slot: int, start: Cursor) -> None:
        self.assignment = assignment
        self.slot = slot
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return (unit for _, unit in places(self.assignment, self.slot, self.start))


def unit_loader(units: UnitBlocks, numbers: Any, num_workers: int) -> DataLoader[torch.Tensor | DataError]:
    """A DataLoader that yields whole units in the given order, whatever the number of workers."""
    return DataLoader(
        units,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_interrupts_to_parent,
        # Without one of its own a DataLoader draws from torch's global generator and changes the run.
        generator=torch.Generator(),
    )


def to_ids(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Blocks as one int64 tensor (B, T)."""
    return torch.cat([part.to(torch.int64) for part in rows])


def _unchanged(value: Any) -> Any:
    return value


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
