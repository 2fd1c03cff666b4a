"""One stage's exchange with one member over a direct link: which frame is to be sent next, and what to do with one."""

import threading
from collections.abc import Callable

from hivetrain.averaging.codecs import Data
from hivetrain.averaging.direct.frames import FrameError, Header, Kind
from hivetrain.averaging.reduction import ExchangeError, Reduction

_LEAD = 2  # parts that are sent before the first average, where both are due

Receive = Callable[[memoryview], None]


class Session:
    """Connects a link's two threads to a reduction.

    Args:
        group: name of the group.
        stage: of the compressor.
        member: who is at the other end.
        reduction: of that stage.
        on_done: called, on any thread, when nothing is owed in either direction.
    """

    def __init__(
        self, group: bytes, stage: int, member: int, reduction: Reduction, on_done: Callable[[], None]
    ) -> None:
        self._group, self._stage, self.member = group, stage, member
        self.reduction, self._on_done = reduction, on_done
        self._own_parts, self._their_parts = len(reduction.ranges[reduction.me]), len(reduction.ranges[member])
        self._parts_sent = self._averages_sent = 0
        if not reduction.claim(member, "link"):
            raise ExchangeError(f"member {member} uses two ways at once", [member])
        self._scratch = bytearray(0)
        self._lock = threading.Lock()
        self.is_done = False
        self._check_done()

    def next_frame(self) -> tuple[Header, Callable[[], Data]] | None:
        """What to send now, and how to get its payload; None if there is nothing for now. For the sending thread."""
        if self.reduction.error is not None:
            return None
        average, part = self._averages_sent, self._parts_sent
        has_average = average < min(self._own_parts, self.reduction.completed)
        has_part = part < self._their_parts and self.reduction.may_send(self.member, part)
        # In step, not averages first: who is behind with its parts would fall further behind, and in the end the other
        # end's line would stand idle, with nothing to average.
        is_ahead = part * self._own_parts > (average + _LEAD) * self._their_parts
        if has_average and (is_ahead or not has_part):
            size = self.reduction.size_of(self.reduction.me, average)
            return self._header(Kind.AVERAGE, average, size), lambda: self.reduction.average(self.member, average)
        if has_part:
            size = self.reduction.size_of(self.member, part)
            return self._header(Kind.PART, part, size), lambda: self.reduction.outgoing(self.member, part)
        return None

    def sent(self, header: Header) -> None:
        """A frame has left."""
        if header.kind is Kind.AVERAGE:
            self._averages_sent += 1
            self.reduction.taken(self.member, header.index)
        else:
            self._parts_sent += 1
            self.reduction.debts.send(self.member, header.index)
        self._check_done()

    def received(self, header: Header, receive: Receive) -> None:
        """Takes a frame whose payload is still to be received. For the receiving thread.

        Raises:
            FrameError, ValueError, ExchangeError: it is not what is due.
        """
        reduction, index = self.reduction, header.index
        if header.kind is Kind.PART:
            reduction.expect(self.member, index)
            self._check_length(header, reduction.me)
            room = memoryview(bytearray(header.length)) if reduction.keeps else self._room(header.length)
            receive(room)
            reduction.add(self.member, index, room)
        else:
            if index != reduction.averaged[self.member]:
                raise FrameError(f"sent average {index} after {reduction.averaged[self.member]}")
            self._check_length(header, self.member)
            place = reduction.room_for(self.member, index)
            room = self._room(header.length) if place is None else place
            receive(room)
            reduction.store(self.member, index, room, in_place=place is not None)
        self._check_done()

    def fail(self, error: ExchangeError) -> None:
        """The link has broken, or the other end has given up."""
        self.reduction.fail(error)

    @property
    def owes_averages(self) -> bool:
        """Whether the member has averages still to send."""
        return self.reduction.averaged[self.member] < self._their_parts

    def _header(self, kind: Kind, index: int, size: int) -> Header:
        return Header(kind, self._group, size, self._stage, index)

    def _check_length(self, header: Header, owner: int) -> None:
        expected = self.reduction.size_of(owner, header.index)
        if header.length != expected:
            raise FrameError(f"sent {header.length} bytes where a part takes {expected}")

    def _room(self, size: int) -> memoryview:
        """Memory that is used again for the next part."""
        if len(self._scratch) < size:
            self._scratch = bytearray(size)
        return memoryview(self._scratch)[:size]

    def _check_done(self) -> None:
        reduction = self.reduction
        with self._lock:
            if self.is_done or self._parts_sent < self._their_parts or self._averages_sent < self._own_parts:
                return
            if reduction.received[self.member] < self._own_parts or self.owes_averages:
                return
            self.is_done = True
        self._on_done()
