"""The sketch of a gradient: 256 numbers, linear in it, whose length and distances are the gradient's to within a few %.

All tensors count as one long vector x, cut into blocks of L = 256 * 4093 elements. Element p of block b gets the sign
u_b * v_(o_b + p) and is added to sum number p mod 4093; a dense random +-1 matrix turns these 4093 sums into 256. The
signs u and v, the offsets o and the matrix are drawn from the seed.

Surprising fact: nothing here is a matrix product in fp32. One would be rounded to TF32 or bf16 under the settings of
many training scripts, and honest miners would differ by as much as a cheat does. 4093 is prime so that a gradient which
lives in few columns of a layer spreads over all sums, whatever the width; the offsets keep blocks that are alike (a
low-rank gradient) from adding up or cancelling as wholes.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import msgpack
import numpy as np
import torch

SKETCH_SIZE = 256
SKETCH_BYTES = 4 * SKETCH_SIZE  # as it stands in records: fp32, little-endian
_SUMS = 4093
_BLOCK = 256 * _SUMS
_ALIGNMENT = 16  # of offsets, in elements: a cache line
_BLOCKS_AT_ONCE = {"cuda": 16}  # else 1: 4 MiB stay in a CPU's cache, 64 MiB spare a GPU many launches
_DOMAIN = b"hivetrain/contribution/1/sketch"


def sketch_seed(run_id: str, swarm_epoch: int, params_digest: str) -> bytes:
    """The 32 bytes that all sketches of one epoch are drawn from."""
    return hashlib.sha256(_DOMAIN + msgpack.packb([run_id, swarm_epoch, params_digest])).digest()


class Sketcher:
    """Sketches gradients of one shape with one seed.

    Args:
        seed: as :func:`sketch_seed` makes it.
        sizes: number of elements of each tensor, in the order in which all peers hold them.
        device: where the gradients are. It takes 24 MiB of memory there, 84 MiB of a GPU's.
    """

    def __init__(self, seed: bytes, sizes: Sequence[int], device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._ends = [0, *accumulate(sizes)]
        blocks = -(-self._ends[-1] // _BLOCK)
        words = np.frombuffer(_stream(seed, b"blocks", 8 * blocks), dtype="<u8")
        self._offsets = [_ALIGNMENT * (int(word) // 2 % (_BLOCK // _ALIGNMENT)) for word in words]
        self._block_signs = torch.from_numpy((words % 2).astype(np.float64) * 2 - 1).to(self.device)
        self._signs = torch.from_numpy(_signs(seed, b"signs", 2 * _BLOCK).astype(np.float32)).to(self.device)
        matrix = _signs(seed, b"matrix", SKETCH_SIZE * _SUMS).reshape(SKETCH_SIZE, _SUMS) / 16  # 1 / sqrt(SKETCH_SIZE)
        self._matrix = torch.from_numpy(matrix).to(self.device)
        self._zeros = torch.zeros(_BLOCK, device=self.device)
        self._at_once = max(1, min(blocks, _BLOCKS_AT_ONCE.get(self.device.type, 1)))
        self._buffer = torch.empty(self._at_once, _BLOCK, device=self.device)

    def sketch(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Sketch of the tensors, one for each size, of any float dtype; None means zeros.

        Returns:
            (256,) fp32 on the CPU.

        Raises:
            ValueError: they are not of this sketcher's sizes.
        """
        sizes = [end - begin for begin, end in zip(self._ends[:-1], self._ends[1:], strict=True)]
        if len(tensors) != len(sizes) or any(
            tensor is not None and tensor.numel() != size for tensor, size in zip(tensors, sizes, strict=True)
        ):
            raise ValueError("the tensors have other sizes than this sketcher was made for")
        return self._project([None if tensor is None else _flat(tensor) for tensor in tensors], self._ends)

    def sketch_flat(self, vector: torch.Tensor) -> torch.Tensor:
        """Sketch of the concatenation of the tensors, (n,).

        Raises:
            ValueError: it has another length.
        """
        if vector.numel() != self._ends[-1]:
            raise ValueError(f"the vector has {vector.numel()} elements, the sketcher was made for {self._ends[-1]}")
        return self._project([_flat(vector)], [0, self._ends[-1]])

    @torch.no_grad()
    def _project(self, flats: Sequence[torch.Tensor | None], ends: Sequence[int]) -> torch.Tensor:
        sums = torch.zeros(_SUMS, dtype=torch.float64, device=self.device)
        for first in range(0, len(self._offsets), self._at_once):
            rows = min(self._at_once, len(self._offsets) - first)
            depth = -(-min(_BLOCK, ends[-1] - first * _BLOCK) // _SUMS)  # 256, or what a short last block needs
            values = self._buffer[:rows, : depth * _SUMS]
            for row, value in enumerate(values):
                begin = (first + row) * _BLOCK
                offset = self._offsets[first + row]
                signs = self._signs[offset : offset + len(value)]
                pieces = list(self._pieces(flats, ends, begin, begin + len(value)))
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, out=value)
                torch.mul(whole, signs, out=value)
            folded = values.unflatten(1, (depth, _SUMS)).sum(1).double()
            sums += (folded * self._block_signs[first : first + rows, None]).sum(0)
        return (self._matrix @ sums).to("cpu", torch.float32)

    def _pieces(
        self, flats: Sequence[torch.Tensor | None], ends: Sequence[int], begin: int, stop: int
    ) -> Iterator[torch.Tensor]:
        """Slices that together are elements [begin, stop) of the concatenation, which zeros continue."""
        which = bisect_right(ends, begin) - 1
        while begin < stop:
            flat = flats[which] if which < len(flats) else None
            end = min(stop, ends[which + 1]) if which < len(flats) else stop
            if flat is None:
                yield self._zeros[: end - begin]
            else:
                yield flat[begin - ends[which] : end - ends[which]].to(self.device)
            begin, which = end, which + 1


def sketch_bytes(vector: torch.Tensor) -> bytes:
    """A sketch, (256,), as it stands in records."""
    return vector.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes()


def sketch_vector(data: bytes) -> torch.Tensor:
    """The inverse of :func:`sketch_bytes`."""
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ValueError(f"a gradient must be a dense float tensor, got {tensor.dtype}, {tensor.layout}")
    return tensor.detach().reshape(-1)


def _stream(seed: bytes, use: bytes, size: int) -> bytes:
    return hashlib.shake_256(_DOMAIN + b"/" + use + b"/" + seed).digest(size)


def _signs(seed: bytes, use: bytes, count: int) -> np.ndarray:
    """``count`` numbers that are +1 or -1, fp64."""
    bits = np.unpackbits(np.frombuffer(_stream(seed, use, -(-count // 8)), dtype=np.uint8), count=count)
    return bits.astype(np.float64) * 2 - 1
