"""Who reads which unit: a keyed permutation of the unit numbers, cut into windows and slots.

Nobody coordinates and nothing is drawn at random: two slots cannot meet because they read different places of one
permutation. The surprising fact: it can be run backwards, so an auditor finds a unit's rightful owner in microseconds.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from hivetrain.data.errors import AssignmentError

DEFAULT_SLOTS = 256
_ROUNDS = 4


@dataclass(frozen=True)
class DataAssignment:
    """The units of every slot in every window of one pass over the data.

    Within a pass no unit is given twice. A remainder too small to give every slot a full window, fewer than
    ``n_slots * units_per_window`` units, stays unused in this pass and is another one in the next.

    Args:
        digest: Name of the data, from ``data_digest``.
        n_units: Units that may be assigned (``manifest.n_train_units``).
        seed: Seed of the run.
        data_pass: Number of the pass over the data; each pass has its own permutation.
        n_slots: Number of slots, at least one more than the highest uid.
        units_per_window: Units that a slot has in one window.

    Raises:
        AssignmentError: There are not enough units to give every slot one window.
    """

    digest: str
    n_units: int
    seed: int = 0
    data_pass: int = 0
    n_slots: int = DEFAULT_SLOTS
    units_per_window: int = 1

    def __post_init__(self) -> None:
        if min(self.n_units, self.n_slots, self.units_per_window) < 1 or self.data_pass < 0:
            raise AssignmentError("n_units, n_slots and units_per_window must be at least 1, data_pass at least 0")
        if self.n_windows < 1:
            raise AssignmentError(
                f"{self.n_units} units cannot give {self.n_slots} slots {self.units_per_window} units each: "
                f"set n_slots to at most {max(self.n_units // self.units_per_window, 1)}."
            )

    @property
    def n_windows(self) -> int:
        """Windows in one pass."""
        return self.n_units // (self.n_slots * self.units_per_window)

    def units(self, window: int, slot: int) -> tuple[int, ...]:
        """The units of a slot in a window, in the order in which they are to be read."""
        if not 0 <= slot < self.n_slots:
            raise AssignmentError(f"slot {slot} does not exist: there are {self.n_slots} (n_slots)")
        if not 0 <= window < self.n_windows:
            raise AssignmentError(f"window {window} is not in this pass, which has {self.n_windows}")
        start = (window * self.n_slots + slot) * self.units_per_window
        return tuple(self._permutation.forward(start + i) for i in range(self.units_per_window))

    def owner(self, unit: int) -> tuple[int, int] | None:
        """The (window, slot) that a unit belongs to; None for the remainder that nobody has in this pass."""
        if not 0 <= unit < self.n_units:
            raise AssignmentError(f"unit {unit} does not exist: there are {self.n_units}")
        window, slot = divmod(self._permutation.backward(unit) // self.units_per_window, self.n_slots)
        return (window, slot) if window < self.n_windows else None

    def at_pass(self, data_pass: int) -> "DataAssignment":
        """The same assignment in another pass."""
        return replace(self, data_pass=data_pass)

    @cached_property
    def _permutation(self) -> "Permutation":
        key = hashlib.sha256(f"hivetrain assignment {self.digest} {self.seed} {self.data_pass}".encode()).digest()
        return Permutation(self.n_units, key)


class Permutation:
    """A keyed permutation of ``range(size)`` that stores nothing.

    A balanced Feistel network of four rounds (Luby and Rackoff, 1988) permutes the next larger power of four; values
    outside the range go through again until they fall inside (cycle walking: Black and Rogaway, 2002, section 3.3).

    Args:
        size: Number of values.
        key: Up to 64 bytes that choose the permutation.
    """

    def __init__(self, size: int, key: bytes) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._hashes = [hashlib.blake2b(digest_size=8, key=key, salt=bytes([i])) for i in range(_ROUNDS)]

    def forward(self, index: int) -> int:
        """The value at a place."""
        while True:
            left, right = index >> self._half_bits, index & self._mask
            for number in range(_ROUNDS):
                left, right = right, left ^ self._mix(number, right)
            index = left << self._half_bits | right
            if index < self.size:
                return index

    def backward(self, value: int) -> int:
        """The place of a value."""
        while True:
            left, right = value >> self._half_bits, value & self._mask
            for number in reversed(range(_ROUNDS)):
                left, right = right ^ self._mix(number, left), left
            value = left << self._half_bits | right
            if value < self.size:
                return value

    def _mix(self, number: int, half: int) -> int:
        state = self._hashes[number].copy()
        state.update(half.to_bytes(8, "little"))
        return int.from_bytes(state.digest(), "little") & self._mask


def slot_of_peer(peer_id: str, n_slots: int) -> int:
    """The slot of a peer where no chain gives it a uid: a hash, so two peers share one with probability 1 / n_slots."""
    digest = hashlib.sha256(b"hivetrain slot " + peer_id.encode()).digest()
    return int.from_bytes(digest, "little") % n_slots
