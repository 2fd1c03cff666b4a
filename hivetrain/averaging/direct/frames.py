"""What travels on a direct link: frames with a fixed header, whose length is checked before anything is read for it."""

import struct
from dataclasses import dataclass
from enum import IntEnum

_HEADER = struct.Struct(">BBHII32s")
HEADER_BYTES = _HEADER.size
MAX_PART_BYTES = 4 * 2**20


class FrameError(ValueError):
    """What came is no frame."""


class Kind(IntEnum):
    """What a frame says.

    ``USE``: this link serves the group. ``PART``: a part for the receiver to reduce. ``AVERAGE``: a reduced part.
    ``BALLOT`` and ``ANSWER``: the vote.
    """

    USE = 1
    PART = 2
    AVERAGE = 3
    BALLOT = 4
    ANSWER = 5


_MAX_BYTES = {
    Kind.USE: 0,
    Kind.PART: MAX_PART_BYTES,
    Kind.AVERAGE: MAX_PART_BYTES,
    Kind.BALLOT: 32,
    Kind.ANSWER: 32 + 34 * 1024,
}


@dataclass(frozen=True)
class Header:
    """The head of a frame.

    Attributes:
        kind: what the frame says.
        group: name of the group, 32 bytes.
        length: bytes of payload that follow.
        stage: of the compressor; 0 where it means nothing.
        index: of the part in its slice; 0 where it means nothing.
    """

    kind: Kind
    group: bytes
    length: int = 0
    stage: int = 0
    index: int = 0

    def to_bytes(self) -> bytes:
        return _HEADER.pack(self.kind, self.stage, 0, self.index, self.length, self.group)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> "Header":
        """Parses a header. Raises FrameError on anything that is not one, or that announces too much."""
        if len(data) != HEADER_BYTES:
            raise FrameError(f"a header has {HEADER_BYTES} bytes, got {len(data)}")
        kind, stage, reserved, index, length, group = _HEADER.unpack(data)
        if kind not in _MAX_BYTES or reserved:
            raise FrameError("not a header")
        if length > _MAX_BYTES[Kind(kind)]:
            raise FrameError(f"a frame of kind {kind} has at most {_MAX_BYTES[Kind(kind)]} bytes, got {length}")
        return cls(Kind(kind), group, length, stage, index)
