"""Which member reduces which elements of the vector, and in which parts they travel."""

from collections.abc import Sequence
from dataclasses import dataclass

PART_ELEMENTS = 2**18


@dataclass(frozen=True)
class Layout:
    """Member i owns ``bounds[i] <= element < bounds[i + 1]``.

    Attributes:
        bounds: one more than members.
        part_elements: longest part of each member's slice; None: :data:`PART_ELEMENTS` for all.
    """

    bounds: tuple[int, ...]
    part_elements: tuple[int, ...] | None = None

    def parts(self, member: int) -> list[tuple[int, int]]:
        """The (start, stop) ranges of a member's slice, in the order in which they travel."""
        start, stop = self.bounds[member], self.bounds[member + 1]
        step = PART_ELEMENTS if self.part_elements is None else self.part_elements[member]
        return [(begin, min(begin + step, stop)) for begin in range(start, stop, step)]

    @classmethod
    def split(cls, numel: int, sizes: Sequence[int], part_elements: Sequence[int] | None = None) -> "Layout":
        """Builds a layout from the number of elements per member."""
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + int(size))
        assert bounds[-1] == numel, "slices must cover the vector"
        return cls(tuple(bounds), None if part_elements is None else tuple(part_elements))
