"""The arithmetic of one all-reduce, whoever brings the bytes: any thread may add parts, take averages and store them.

The surprising fact: a reducer keeps only a window of parts, and nobody may send ahead of it. A member sends part k of a
slice after it has the average of part k - window, so memory is bounded without a word about it on the wire.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from blake3 import blake3

from hivetrain.averaging.codecs import Codec, Data, scratch, view_of
from hivetrain.averaging.debts import Debts
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.rules import Rule

BUFFER_BYTES = 64 * 2**20
_MAX_WINDOW = 16
_NOTHING = torch.empty(0)


class ExchangeError(Exception):
    """The exchange cannot be completed; the message names the member where one is to blame.

    Attributes:
        culprits: members whose fault this member has seen itself.
        quitter: the member whose word this is: it has given up.
        accused: the member whose fault it is by that word.
    """

    def __init__(
        self, message: str, culprits: Sequence[int] = (), quitter: int | None = None, accused: int | None = None
    ) -> None:
        super().__init__(message)
        self.culprits, self.quitter, self.accused = tuple(culprits), quitter, accused


@dataclass
class Traffic:
    """Payload bytes to and from other members, and elements of the result that have arrived."""

    sent: int = 0
    received: int = 0
    elements: int = 0


@dataclass
class _Part:
    """One part of the own slice: who has not sent it, what the others sent, and the encoded average in the end."""

    start: int
    stop: int
    missing: set[int]
    is_untouched: bool = True
    held: dict[int, torch.Tensor] = field(default_factory=dict)
    average: Data | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Reduction:
    """Reduces the own slice and gathers the others'.

    Args:
        me: this member's index.
        weights: averaging weight of each member, positive sum.
        layout: who reduces what.
        vector: shape (n,), fp32 on CPU; only read.
        codec: how parts are encoded.
        rule: how parts become one.
        result: gets the result, shape (n,), fp32 on CPU.
    """

    def __init__(
        self, me: int, weights: Sequence[float], layout: Layout, vector: torch.Tensor, codec: Codec, rule: Rule,
        result: torch.Tensor,
    ) -> None:  # fmt: skip
        self.me, self.vector, self._codec, self._rule = me, vector, codec, rule
        self._shares = [weight / float(sum(weights)) for weight in weights]
        self.result = result
        self._raw = view_of(self.result)
        everyone = range(len(weights))
        self.ranges = [layout.parts(member) for member in everyone]
        others = set(everyone) - {me}
        self._parts = [_Part(start, stop, set(others)) for start, stop in self.ranges[me]]
        longest = max((stop - start for parts in self.ranges for start, stop in parts), default=1)
        self.window = max(2, min(_MAX_WINDOW, BUFFER_BYTES // (4 * longest * len(weights))))
        self.debts = Debts(me, [len(parts) for parts in self.ranges], self.window)
        self.received, self.averaged = self.debts.received, self.debts.averaged
        self.quitters: set[int] = set()  # members that have given up
        self._ways: dict[int, str] = {}
        self.error: ExchangeError | None = None
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        self._digests: dict[tuple[int, int], bytes] = {}

    def listen(self, changed: Callable[[], None]) -> None:
        """Has ``changed`` called, on any thread, whenever something has become possible or has failed."""
        self._listeners.append(changed)

    def claim(self, member: int, way: str) -> bool:
        """Whether a member's bytes may take this way: they take one alone, the first."""
        return self._ways.setdefault(member, way) == way

    def fail(self, error: ExchangeError) -> None:
        """Ends the reduction, unless a fault is of members that have given up: that is no news."""
        if not error.culprits or not self.quitters.issuperset(error.culprits):
            self.end(error)

    def end(self, error: ExchangeError) -> None:
        """Ends the reduction; the first error counts."""
        with self._lock:
            self.error = self.error or error
        self._tell()

    def size_of(self, member: int, index: int) -> int:
        """Bytes of an encoded part of a member's slice. Raises ExchangeError if there is no such part."""
        ranges = self.ranges[member]
        if not 0 <= index < len(ranges):
            raise ExchangeError(f"a slice of {len(ranges)} parts has no part {index}")
        start, stop = ranges[index]
        return self._codec.size_bytes(stop - start)

    def outgoing(self, member: int, index: int) -> Data:
        """The own values of a part that ``member`` reduces, encoded."""
        start, stop = self.ranges[member][index]
        data = self._codec.encode(self.vector[start:stop])
        self._count(sent=len(data))
        return data

    def may_send(self, member: int, index: int) -> bool:
        """Whether the window is open for a part that ``member`` reduces."""
        return index < self.averaged[member] + self.window

    def expect(self, member: int, index: int) -> None:
        """Raises ExchangeError unless ``index`` is the part of the own slice that ``member`` may send now."""
        if index < self.received[member]:
            raise ExchangeError(f"member {member} sent a part twice", [member])
        if index != self.received[member] or index >= len(self._parts):
            raise ExchangeError(f"member {member}: sent part {index} after {self.received[member]} parts", [member])
        if index >= self.debts.given[member] + self.window:
            raise ExchangeError(f"member {member}: sent part {index} ahead of its window", [member])

    def add(self, member: int, index: int, data: Data) -> None:
        """Takes a member's part of the own slice; ``data`` is not used any more after it, unless :attr:`keeps`.

        Raises:
            ValueError: the data are not values of that part.
            ExchangeError: it is not the part that is due.
        """
        self._count(received=len(data))
        self.expect(member, index)
        part = self._parts[index]
        numel = part.stop - part.start
        values = self._codec.decode(data, numel, None if self.keeps or self._codec.name == "none" else scratch(numel))
        check_finite(values)
        with part.lock:
            if member not in part.missing:
                raise ExchangeError(f"member {member} sent a part twice", [member])
            total, own = self.result[part.start : part.stop], self.vector[part.start : part.stop]
            if self._rule.needs_all:
                part.held[member] = values
            else:
                # fp32 sums are commutative but not associative; only this member computes them, so all see the same.
                if part.is_untouched:
                    torch.mul(own, self._shares[self.me], out=total)
                total.add_(values, alpha=self._shares[member])
            part.is_untouched = False
            part.missing.discard(member)
            self.received[member] = index + 1
            if len(part.missing) == 1:
                self.debts.await_alone(index, *part.missing)
            if part.missing:
                return
            if self._rule.needs_all:
                self._rule.reduce({**part.held, self.me: own}, self._shares, total)
                part.held.clear()
            self._complete(index, part, total)
        self._tell()

    @property
    def keeps(self) -> bool:
        """Whether parts are kept until all are there, so that their memory must not be used again."""
        return self._rule.needs_all

    def _complete(self, index: int, part: _Part, total: torch.Tensor) -> None:
        data = self._codec.encode(total)
        if self._codec.name != "none":
            self._codec.decode(data, part.stop - part.start, total)
        part.average = data
        self._count(elements=part.stop - part.start)
        self._digests[self.me, index] = blake3(data).digest()
        with self._lock:
            self.debts.complete(index)  # members send in order, so parts are completed in order

    @property
    def completed(self) -> int:
        """Averages of the own slice."""
        return self.debts.completed

    @property
    def is_complete(self) -> bool:
        """Whether the own slice is reduced."""
        return self.completed == len(self._parts)

    def average(self, member: int, index: int) -> Data:
        """The encoded average of a completed part of the own slice, for one member."""
        data = self._parts[index].average
        assert data is not None, "wait until it is completed"
        self._count(sent=len(data))
        self.debts.given[member] = index + 1
        return data

    def taken(self, member: int, index: int) -> None:
        """A member has the average of a part of the own slice; when all have it, it is forgotten."""
        part = self._parts[index]
        with part.lock:
            self.debts.take(member, index)
            if self._codec.name != "none" and self._is_taken(index):
                part.average = None

    def _is_taken(self, index: int) -> bool:
        return all(count > index for member, count in enumerate(self.debts.taken) if member != self.me)

    def detach(self) -> torch.Tensor:
        """Gives the result away; keeps copies of the averages that have not been taken yet and are views of it."""
        for index, part in enumerate(self._parts):
            with part.lock:
                if self._is_taken(index):
                    part.average = None
                elif part.average is not None:
                    part.average = bytes(part.average)
        result, self.result, self.vector, self._raw = self.result, _NOTHING, _NOTHING, memoryview(b"")
        return result

    def room_for(self, member: int, index: int) -> memoryview | None:
        """Where the bytes of an average may be written at once; None if they must be decoded."""
        start, stop = self.ranges[member][index]
        return self._raw[4 * start : 4 * stop] if self._codec.name == "none" else None

    def store(self, member: int, index: int, data: Data, *, in_place: bool = False) -> None:
        """Takes the average of a part from the member that reduced it; ``in_place`` if it was written to its room.

        Raises:
            ValueError: the data are not values of that part.
            ExchangeError: it is not the part that is due.
        """
        self._count(received=len(data))
        if index != self.averaged[member]:
            raise ExchangeError(f"member {member}: sent average {index} after {self.averaged[member]}", [member])
        start, stop = self.ranges[member][index]
        out = None if in_place else self.result[start:stop]
        check_finite(self._codec.decode(data, stop - start, out))
        self._digests[member, index] = blake3(data).digest()
        self._count(elements=stop - start)
        self.debts.store(member, index)
        self._tell()

    def digest(self) -> bytes:
        """BLAKE3 of the BLAKE3 of all averages as they travelled, in order of member and part; 32 bytes."""
        return blake3(b"".join(self._digests[key] for key in sorted(self._digests))).digest()

    def _count(self, sent: int = 0, received: int = 0, elements: int = 0) -> None:
        with self._lock:
            self.traffic.sent += sent
            self.traffic.received += received
            self.traffic.elements += elements

    def _tell(self) -> None:
        for changed in self._listeners:
            changed()


def check_finite(values: torch.Tensor) -> None:
    """Raises ValueError for values that would end in everybody's params, for good, as infinite or not numbers."""
    # The sum is twenty times as fast to look at, but too large values can make it infinite as well.
    if not values.sum().isfinite() and not values.isfinite().all():
        raise ValueError("sent values that are infinite or not numbers")
