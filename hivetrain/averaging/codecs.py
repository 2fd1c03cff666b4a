"""How a piece of the averaged vector is written on the wire.

A codec sees flat fp32 tensors only and its output has a size that the receiver knows beforehand, so that the length of
a message is checked before anything is allocated for it. Where no conversion is needed, both directions are views.
"""

import threading
from abc import ABC, abstractmethod

import torch

_INT8_BLOCK = 1024
_threads = threading.local()
_TINY = torch.finfo(torch.float32).tiny

Data = bytes | bytearray | memoryview


class Codec(ABC):
    """Encodes flat fp32 CPU tensors into bytes of a size known from the number of elements alone."""

    name: str

    @abstractmethod
    def encode(self, values: torch.Tensor) -> Data:
        """Encodes ``values``, shape (n,), fp32 on CPU. What it returns may be a view of them."""

    @abstractmethod
    def decode(self, data: Data, numel: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Decodes to an fp32 tensor of shape (numel,): to ``out``, or else to one that may be a view of writable data.

        Raises:
            ValueError: the length of ``data`` is wrong.
        """

    @abstractmethod
    def size_bytes(self, numel: int) -> int:
        """Length of the encoding of ``numel`` elements."""

    def _check(self, data: Data, numel: int) -> None:
        if len(data) != self.size_bytes(numel):
            raise ValueError(f"{self.name}: {numel} elements take {self.size_bytes(numel)} bytes, got {len(data)}")


class Float32(Codec):
    """The values as they are."""

    name = "none"

    def encode(self, values: torch.Tensor) -> Data:
        return view_of(values)

    def decode(self, data: Data, numel: int, out: torch.Tensor | None = None) -> torch.Tensor:
        self._check(data, numel)
        values = torch.frombuffer(_writable(data), dtype=torch.float32) if numel else torch.empty(0)
        return values if out is None else out.copy_(values)

    def size_bytes(self, numel: int) -> int:
        return 4 * numel


class Float16(Codec):
    """IEEE half precision; values beyond its range saturate at +-65504."""

    name = "fp16"

    def encode(self, values: torch.Tensor) -> Data:
        limit = torch.finfo(torch.float16).max
        return view_of(torch.clamp(values, -limit, limit, out=scratch(values.numel())).to(torch.float16))

    def decode(self, data: Data, numel: int, out: torch.Tensor | None = None) -> torch.Tensor:
        self._check(data, numel)
        out = torch.empty(numel) if out is None else out
        return out.copy_(torch.frombuffer(_writable(data), dtype=torch.float16)) if numel else out

    def size_bytes(self, numel: int) -> int:
        return 2 * numel


class Int8(Codec):
    """Symmetric 8-bit integers with one fp32 scale per block of 1,024 elements."""

    name = "int8"

    def encode(self, values: torch.Tensor) -> Data:
        numel, blocks = values.numel(), _blocks(values.numel())
        if numel % _INT8_BLOCK:
            values = torch.cat([values, values.new_zeros(blocks * _INT8_BLOCK - numel)])
        table = values.view(blocks, _INT8_BLOCK)
        encoded = torch.empty(self.size_bytes(blocks * _INT8_BLOCK), dtype=torch.uint8)
        scales, codes = encoded[: 4 * blocks].view(torch.float32), encoded[4 * blocks :].view(torch.int8)
        levels = scratch(table.numel()).view_as(table)
        torch.div(torch.abs(table, out=levels).amax(dim=1), 127, out=scales)
        torch.div(table, scales.clamp_min(_TINY)[:, None], out=levels).round_()  # before it at most 127 and an error
        codes.copy_(levels.view(-1))
        return view_of(encoded[: self.size_bytes(numel)])

    def decode(self, data: Data, numel: int, out: torch.Tensor | None = None) -> torch.Tensor:
        self._check(data, numel)
        out = torch.empty(numel) if out is None else out
        if not numel:
            return out
        blocks, raw = _blocks(numel), _writable(data)
        scales = torch.frombuffer(raw, dtype=torch.float32, count=blocks)
        out.copy_(torch.frombuffer(raw, dtype=torch.int8, offset=4 * blocks))
        whole = numel // _INT8_BLOCK
        size = whole * _INT8_BLOCK
        out[:size].view(whole, _INT8_BLOCK).mul_(scales[:whole, None])
        out[size:].mul_(scales[-1])  # the rest of a block; of none where all are whole
        return out

    def size_bytes(self, numel: int) -> int:
        return numel + 4 * _blocks(numel)


def view_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's buffers are unknown to mypy


def scratch(numel: int) -> torch.Tensor:
    """This thread's memory for something that is needed for a moment, shape (numel,), fp32 on CPU."""
    if len(getattr(_threads, "scratch", ())) < numel:
        _threads.scratch = torch.empty(numel)
    room: torch.Tensor = _threads.scratch
    return room[:numel]


def _blocks(numel: int) -> int:
    return -(-numel // _INT8_BLOCK)


def _writable(data: Data) -> bytearray | memoryview:
    """``data`` itself if tensors may look into it, else a copy."""
    is_writable = isinstance(data, bytearray) or (isinstance(data, memoryview) and not data.readonly)
    return data if is_writable else bytearray(data)  # type: ignore[return-value]


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float32(), Float16(), Int8())}


def make_codec(name: str) -> Codec:
    """Returns the codec called ``name`` after proving a round trip.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: what comes back is not what was sent, within the codec's resolution.
    """
    if name not in CODECS:
        raise ValueError(f"compression {name!r} is unknown; choose one of {', '.join(CODECS)}")
    codec = CODECS[name]
    sent = torch.linspace(-3, 3, 2 * _INT8_BLOCK + 7)
    received = codec.decode(codec.encode(sent), sent.numel())
    if not torch.allclose(received, sent, atol=3 / 127):
        raise RuntimeError(f"compression {name!r} does not survive a round trip on this machine")
    return codec
