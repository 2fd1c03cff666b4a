"""What is averaged in place of the gradient, and how its pieces are written on the wire.

A compressor turns one gradient into a few vectors that are averaged one after the other. It works as a generator: it
yields a vector, is sent the average of the members' vectors, and returns the averaged gradient in the end. All that it
does between is linear, or computed from averages only, so every member ends with the same result.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence

import torch

from hivetrain.averaging.codecs import CODECS, Codec, make_codec

Stages = Generator[torch.Tensor, torch.Tensor, torch.Tensor]

_POWERSGD = re.compile(r"powersgd\((\d+)\)")


class Compressor(ABC):
    """Compresses flat fp32 gradients, shape (n,), on CPU."""

    codec: Codec

    @abstractmethod
    def stages(self, gradient: torch.Tensor, epoch: int) -> Stages:
        """Averages ``gradient`` at the end of ``epoch``: yields vectors, is sent their averages, returns the result."""

    def commit(self) -> None:  # noqa: B027  # most have no state
        """Keeps what :meth:`stages` learned: its round was committed. Without this call it never happened."""

    def reset(self) -> None:  # noqa: B027
        """Forgets all state: the params are others now."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep; empty without state."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Takes over what :meth:`state_dict` returned."""


class Plain(Compressor):
    """The gradient as it is, in the codec's precision."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def stages(self, gradient: torch.Tensor, epoch: int) -> Stages:
        return (yield gradient)


class PowerSGD(Compressor):
    """Low-rank averages with error feedback.

    Algorithm: PowerSGD, Vogels et al. (arXiv:1905.13727), Alg. 1 and 2. Instead of a warm start the right factor is
    drawn anew from the epoch, equal on all peers: so a peer that joins late needs nothing but the params.

    Args:
        rank: columns of the factors.
        shapes: shapes of the trainable params, in the order in which the gradient concatenates them. Tensors whose
            factors would not be smaller than themselves travel as they are.
    """

    def __init__(self, rank: int, shapes: Sequence[torch.Size]) -> None:
        if rank < 1:
            raise ValueError("the rank of powersgd must be at least 1")
        self.codec, self.rank = CODECS["fp16"], rank  # the factors; what rounding loses is not owed
        self._error: torch.Tensor | None = None
        self._next_error: torch.Tensor | None = None
        self._matrices: list[tuple[int, int, int]] = []  # (offset, rows, columns)
        self._rest: list[tuple[int, int]] = []  # (start, stop)
        offset = 0
        for shape in shapes:
            numel = shape.numel()
            rows = shape[0] if len(shape) > 1 else 1
            columns = numel // max(1, rows)
            if rank * (rows + columns) < numel:
                self._matrices.append((offset, rows, columns))
            else:
                self._rest.append((offset, offset + numel))
            offset += numel

    def stages(self, gradient: torch.Tensor, epoch: int) -> Stages:
        wanted = gradient if self._error is None else gradient + self._error
        matrices = [wanted[at : at + rows * columns].view(rows, columns) for at, rows, columns in self._matrices]
        generator = torch.Generator().manual_seed(_seed(epoch))
        right = [torch.randn(columns, self.rank, generator=generator) for _, _, columns in self._matrices]
        left = [matrix @ factor for matrix, factor in zip(matrices, right, strict=True)]
        rest = [wanted[start:stop] for start, stop in self._rest]
        average = yield torch.cat([part.reshape(-1) for part in (*left, *rest)])
        sizes = [factor.numel() for factor in left] + [part.numel() for part in rest]
        averages = average.split(sizes)
        basis = [_orthonormal(part.view_as(factor)) for part, factor in zip(averages[: len(left)], left, strict=True)]
        result = torch.empty_like(wanted)
        for (start, stop), part in zip(self._rest, averages[len(left) :], strict=True):
            result[start:stop] = part
        if basis:
            right = [matrix.T @ factor for matrix, factor in zip(matrices, basis, strict=True)]
            average = yield torch.cat([factor.reshape(-1) for factor in right])
            parts = average.split([factor.numel() for factor in right])
            own = result.clone()
            for (at, rows, columns), factor, mine, part in zip(self._matrices, basis, right, parts, strict=True):
                result[at : at + rows * columns] = _outer_sum(factor, part.view_as(mine)).reshape(-1)
                own[at : at + rows * columns] = (factor @ mine.T).reshape(-1)
            for start, stop in self._rest:
                own[start:stop] = wanted[start:stop]  # travelled in full: nothing is owed
            self._next_error = wanted - own
        return result

    def commit(self) -> None:
        self._error = self._next_error

    def reset(self) -> None:
        self._error = self._next_error = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {} if self._error is None else {"error": self._error}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._error = state.get("error")


def make_compressor(name: str, shapes: Sequence[torch.Size]) -> Compressor:
    """Returns the compressor called ``name`` after proving a round trip.

    Args:
        name: ``none``, ``fp16``, ``int8`` or ``powersgd(RANK)``.
        shapes: shapes of the trainable params.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: what comes back is not what was sent, within the compressor's resolution.
    """
    match = _POWERSGD.fullmatch(name)
    if match is None and name not in CODECS:
        raise ValueError(f"compression {name!r} is unknown; choose one of {', '.join(CODECS)} or powersgd(RANK)")
    if match is None:
        return Plain(make_codec(name))
    rank = int(match[1])
    compressor = PowerSGD(rank, shapes)
    _prove_low_rank(rank)
    return compressor


def run_alone(stages: Stages) -> torch.Tensor:
    """The result of ``stages`` in a group of one: each average is the vector itself."""
    vector = next(stages)
    while True:
        try:
            vector = stages.send(vector)
        except StopIteration as end:
            result: torch.Tensor = end.value
            return result


def _orthonormal(average: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns; in fp64 and rounded once, so that machines agree on the bits."""
    return torch.linalg.qr(average.double()).Q.float()


def _outer_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right.T`` column by column: unlike a matrix product's, its rounding is the same on all machines."""
    total = left[:, :1] * right[:, 0]
    for column in range(1, left.shape[1]):
        total += left[:, column : column + 1] * right[:, column]
    return total


def _prove_low_rank(rank: int) -> None:
    rows = 4 * rank + 8
    factor = torch.linspace(-1, 1, rows * rank).view(rows, rank).sin()
    sent = (factor @ factor.T).reshape(-1)
    received = run_alone(PowerSGD(rank, [torch.Size((rows, rows))]).stages(sent, epoch=0))
    if not torch.allclose(received, sent, atol=1e-3 * float(sent.abs().max())):
        raise RuntimeError(f"powersgd({rank}) does not survive a round trip on this machine")


def _seed(epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"powersgd/{epoch}".encode()).digest()[:7])
