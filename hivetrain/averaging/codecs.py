"""How a piece of the averaged vector is written on the wire.

A codec sees flat fp32 tensors only and its output has a size that the receiver knows beforehand, so that the length of
a message is checked before anything is allocated for it.
"""

from abc import ABC, abstractmethod

import torch

_INT8_BLOCK = 1024


class Codec(ABC):
    """Encodes flat fp32 CPU tensors into bytes of a size known from the number of elements alone."""

    name: str

    @abstractmethod
    def encode(self, values: torch.Tensor) -> bytes:
        """Encodes ``values``, shape (n,), fp32 on CPU."""

    @abstractmethod
    def decode(self, data: bytes, numel: int) -> torch.Tensor:
        """Decodes to a new fp32 tensor of shape (numel,). Raises ValueError if the length of ``data`` is wrong."""

    @abstractmethod
    def size_bytes(self, numel: int) -> int:
        """Length of the encoding of ``numel`` elements."""

    def _check(self, data: bytes, numel: int) -> None:
        if len(data) != self.size_bytes(numel):
            raise ValueError(f"{self.name}: {numel} elements take {self.size_bytes(numel)} bytes, got {len(data)}")


class Float32(Codec):
    """The values as they are."""

    name = "none"

    def encode(self, values: torch.Tensor) -> bytes:
        return values.numpy().tobytes()

    def decode(self, data: bytes, numel: int) -> torch.Tensor:
        self._check(data, numel)
        return torch.frombuffer(bytearray(data), dtype=torch.float32)

    def size_bytes(self, numel: int) -> int:
        return 4 * numel


class Float16(Codec):
    """IEEE half precision; values beyond its range saturate at +-65504."""

    name = "fp16"

    def encode(self, values: torch.Tensor) -> bytes:
        limit = torch.finfo(torch.float16).max
        return values.clamp(-limit, limit).to(torch.float16).numpy().tobytes()

    def decode(self, data: bytes, numel: int) -> torch.Tensor:
        self._check(data, numel)
        return torch.frombuffer(bytearray(data), dtype=torch.float16).to(torch.float32)

    def size_bytes(self, numel: int) -> int:
        return 2 * numel


class Int8(Codec):
    """Symmetric 8-bit integers with one fp32 scale per block of 1,024 elements."""

    name = "int8"

    def encode(self, values: torch.Tensor) -> bytes:
        blocks = _blocks(values.numel())
        padded = torch.zeros(blocks * _INT8_BLOCK)
        padded[: values.numel()] = values
        table = padded.view(blocks, _INT8_BLOCK)
        scales = table.abs().amax(dim=1) / 127
        levels = (table / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-127, 127)
        codes = levels.to(torch.int8).view(-1)[: values.numel()]
        return scales.numpy().tobytes() + codes.numpy().tobytes()

    def decode(self, data: bytes, numel: int) -> torch.Tensor:
        self._check(data, numel)
        blocks, raw = _blocks(numel), bytearray(data)
        scales = torch.frombuffer(raw, dtype=torch.float32, count=blocks)
        values = torch.frombuffer(raw, dtype=torch.int8, offset=4 * blocks).to(torch.float32)
        return values.mul_(scales.repeat_interleave(_INT8_BLOCK)[:numel])

    def size_bytes(self, numel: int) -> int:
        return numel + 4 * _blocks(numel)


def _blocks(numel: int) -> int:
    return -(-numel // _INT8_BLOCK)


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
