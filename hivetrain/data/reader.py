"""Any batch of any slot's stream, for those who check a miner's work: by where it begins, not by reading along.

The surprising fact: how many blocks a unit holds is known only once it has been read, so the way to a batch leads
through all units before it. Their numbers are kept, and the blocks of the last few units, so several looks into one
stream tokenize each unit once.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from hivetrain.data.assignment import DataAssignment
from hivetrain.data.errors import AssignmentError, DataError
from hivetrain.data.stream import Batch, Cursor, UnitBlocks, places, to_ids

if TYPE_CHECKING:
    from hivetrain.data.module import RefinedWebDataModule

Place = tuple[int, int, int, int]  # (data_pass, window, place, block), as in Cursor
_REMEMBERED_UNITS = 1 << 16
_MAX_PASS = 1 << 32


class SlotReader:
    """Reads the streams of all slots of a run at any place.

    Args:
        units: Makes the blocks of a unit.
        assignment: Of the run, of any pass.
        collate: Makes a batch of a (B, T) int64 tensor; None gives ``{"input_ids": ids}``.
        keep_units: So many units stay in memory.
        max_offset: Farthest that is read from a place, in blocks.
    """

    def __init__(
        self,
        units: UnitBlocks,
        assignment: DataAssignment,
        collate: Callable[[torch.Tensor], Batch] | None = None,
        keep_units: int = 16,
        max_offset: int = 1 << 20,
    ) -> None:
        self.units = units
        self.assignment = assignment
        self.collate = collate or _ids_alone
        self.max_offset = max_offset
        self._blocks = lru_cache(keep_units)(self._read)
        self._length = lru_cache(_REMEMBERED_UNITS)(lambda unit: len(self._blocks(unit)))

    @classmethod
    def of(cls, data: "RefinedWebDataModule", keep_units: int = 16, max_offset: int = 1 << 20) -> "SlotReader":
        """Reads what training with this data module reads."""
        return cls(data.units, data.assignment, data.collate, keep_units, max_offset)

    def batch(self, slot: int, first: Place, offset: int, count: int) -> tuple[Batch, Place]:
        """The ``count`` blocks that follow ``offset`` blocks after ``first``, collated, and the place of the first one.

        Raises:
            AssignmentError: The data have no such slot or place.
            DataError: It is farther away than ``max_offset``, or a unit cannot be read; nothing is said about a miner.
        """
        if count < 1:
            raise AssignmentError(f"a batch has at least 1 block, not {count}")
        parts = list(self._parts(slot, first, offset, count))
        at, unit, _ = parts[0]
        rows = [self._blocks(unit)[at.block : at.block + taken] for at, unit, taken in parts]
        return self.collate(to_ids(rows)), (at.data_pass, at.window, at.place, at.block)

    def position_at(self, slot: int, first: Place, offset: int) -> Place:
        """The place of the block that follows ``offset`` blocks after ``first``; 0 gives ``first`` itself.

        Raises:
            AssignmentError: The data have no such slot or place.
            DataError: It is farther away than ``max_offset``, or a unit cannot be read; nothing is said about a miner.
        """
        at, _, _ = next(self._parts(slot, first, offset, 1))
        return at.data_pass, at.window, at.place, at.block

    def carry(self, slot: int, place: Place) -> Place:
        """Where the block of a place lies whose number may go on past the end of its unit.

        Raises:
            AssignmentError: The data have no such slot or place, or it goes on farther than ``max_offset``.
            DataError: A unit cannot be read; nothing is said about a miner.
        """
        data_pass, window, at, block = place
        self._check(slot, (data_pass, window, at, min(block, 0)), 0, 1)
        _, unit = next(places(self.assignment, slot, Cursor(data_pass, window, at)))
        last = max(self._length(unit) - 1, 0)
        if block <= last:
            return place
        if block - last >= self.max_offset:
            raise AssignmentError(f"unit {unit}, at {place[:3]}, has no block {block}, nor have the ones behind it")
        return self.position_at(slot, (data_pass, window, at, last), block - last)

    def _parts(self, slot: int, first: Place, offset: int, count: int) -> Iterator[tuple[Cursor, int, int]]:
        """Where the blocks lie: (cursor of the first, unit, how many in this unit)."""
        self._check(slot, first, offset, count)
        barren = 0
        for at, unit in places(self.assignment, slot, Cursor(*first)):
            length = self._length(unit)
            if at.block and at.block >= length:
                raise AssignmentError(f"unit {unit}, at {first[:3]}, has no block {at.block}, but {length}")
            barren = 0 if length else barren + 1
            if barren > self.assignment.n_windows * self.assignment.units_per_window:
                raise DataError(f"no unit holds a full block of {self.units.block_size} tokens: lower block_size.")
            here = length - at.block
            if offset >= here:
                offset -= here
                continue
            taken = min(count, here - offset)
            yield Cursor(at.data_pass, at.window, at.place, at.block + offset), unit, taken
            offset, count = 0, count - taken
            if not count:
                return

    def _check(self, slot: int, first: Place, offset: int, count: int) -> None:
        data_pass, window, place, block = first
        if not (0 <= data_pass < _MAX_PASS and block >= 0 and 0 <= place < self.assignment.units_per_window):
            raise AssignmentError(f"no stream has a place {first}: (data_pass, window, place, block)")
        self.assignment.units(window, slot)  # raises where there is no such window or slot
        if offset < 0:
            raise AssignmentError(f"an offset is at least 0, not {offset}")
        if offset + count > self.max_offset:
            raise DataError(
                f"block {offset + count} after {first} is out of reach: raise max_offset, {self.max_offset}."
            )

    def _read(self, unit: int) -> torch.Tensor:
        blocks = self.units[unit]
        if isinstance(blocks, DataError):
            raise blocks
        return blocks


def _ids_alone(blocks: torch.Tensor) -> Batch:
    return {"input_ids": blocks}
