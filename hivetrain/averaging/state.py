"""Training state as peers see it: its digest, and how it travels to a peer that joins late or has drifted.

The digest covers params only: buffers may rightly differ between peers (batch statistics), and moments follow from the
params' history. A download is checked against the shapes of the own model before a byte is allocated for it.
"""

import hashlib
import itertools
import math
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

MAX_HEADER_BYTES = 8 * 2**20
CHUNK_BYTES = 2**18
_PIECE_BYTES = 2**20
_MAX_ENTRIES_PER_PARAM = 8
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


class StateError(Exception):
    """A peer's state cannot be used here; the message says why."""


@dataclass(frozen=True)
class Snapshot:
    """A consistent copy of a peer's state on CPU.

    Attributes:
        epoch: swarm epoch of the state.
        digest: hex digest of the params.
        tensors: name -> tensor; ``param/NAME``, ``buffer/NAME`` and ``optimizer/INDEX/KEY``.
    """

    epoch: int
    digest: str
    tensors: dict[str, torch.Tensor]

    def header(self) -> bytes:
        listing = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in self.tensors.items()]
        return msgpack.packb([self.epoch, self.digest, listing])

    def chunks(self) -> Iterator[bytes]:
        """The tensors' bytes, in the header's order, in pieces of at most ``CHUNK_BYTES``."""
        for tensor in self.tensors.values():
            raw = memoryview(as_bytes(tensor))
            for start in range(0, len(raw), CHUNK_BYTES):
                yield bytes(raw[start : start + CHUNK_BYTES])


def as_bytes(tensor: torch.Tensor) -> Any:
    """A tensor's bytes as a flat numpy uint8 array (no copy for contiguous CPU tensors)."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def params_digest(module: torch.nn.Module) -> str:
    """SHA-256, in hex, over names, dtypes, shapes and bytes of all params in order of definition."""
    return _digest(module.named_parameters())


def schema_of(module: torch.nn.Module) -> str:
    """SHA-256, in hex, over names, dtypes and shapes of all params, without their values."""
    described = [f"{name}:{p.dtype}:{tuple(p.shape)}" for name, p in module.named_parameters()]
    return hashlib.sha256(";".join(described).encode()).hexdigest()


def take_snapshot(module: torch.nn.Module, optimizer: torch.optim.Optimizer, epoch: int, digest: str) -> Snapshot:
    """Copies params, buffers and optimizer state to CPU."""
    tensors: dict[str, torch.Tensor] = {f"param/{name}": p for name, p in module.named_parameters()}
    tensors |= {f"buffer/{name}": b for name, b in module.named_buffers()}
    for index, param in enumerate(_params_of(optimizer)):
        for key, value in optimizer.state.get(param, {}).items():
            if value is not None:
                tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value)
    return Snapshot(epoch, digest, {name: t.detach().cpu().clone() for name, t in tensors.items()})


def load_snapshot(snapshot: Snapshot, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a snapshot into module and optimizer, keeping devices, hyperparameters and learning rate as they are."""
    with torch.no_grad():
        for name, param in module.named_parameters():
            param.copy_(snapshot.tensors[f"param/{name}"])
        for name, buffer in module.named_buffers():
            buffer.copy_(snapshot.tensors[f"buffer/{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in snapshot.tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, key = rest.partition("/")
            state.setdefault(int(index), {})[key] = tensor
    numbers = itertools.count()
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")  # torch keeps step counters on CPU otherwise
        for param in group["params"]:
            own = state.get(next(numbers), {})
            optimizer.state[param] = {k: v.to(param.device) if v.dim() or on_device else v for k, v in own.items()}


async def receive(
    header: bytes, chunks: AsyncIterator[bytes], module: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Snapshot:
    """Reads a snapshot from a peer, checking it against the own model first.

    Raises:
        StateError: anything is malformed, of another shape, too long, too short, or does not match its digest.
    """
    epoch, digest, listing = _parse_header(header)
    expected = _expected(module, optimizer)
    _check_listing(listing, expected)
    _check_optimizer(listing, optimizer)
    tensors = {name: torch.empty(shape, dtype=_DTYPES[dtype]) for name, dtype, shape in listing}
    await receive_into(tensors.values(), chunks)
    snapshot = Snapshot(epoch, digest, tensors)
    found = _digest_of(snapshot, module)
    if found != digest:
        raise StateError(f"the peer's params have digest {found[:12]}, it claimed {digest[:12]}")
    return snapshot


async def receive_into(tensors: Iterable[torch.Tensor], chunks: AsyncIterator[bytes]) -> None:
    """Fills contiguous CPU tensors, one after the other, with what a peer sends.

    Raises:
        StateError: the peer sent too little, or too much at once.
    """
    pending = bytearray()
    for tensor in tensors:
        need = tensor.numel() * tensor.element_size()
        while len(pending) < need:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                raise StateError("the peer stopped before the end of its state") from None
            if len(chunk) > CHUNK_BYTES:
                raise StateError(f"the peer sent a chunk of {len(chunk)} bytes")
            pending += chunk
        if need:
            raw = torch.frombuffer(pending[:need], dtype=torch.uint8)
            tensor.view(-1).view(torch.uint8).copy_(raw)
        pending = pending[need:]


def _params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _parse_header(header: bytes) -> tuple[int, str, list[tuple[str, str, tuple[int, ...]]]]:
    if len(header) > MAX_HEADER_BYTES:
        raise StateError(f"a header of {len(header)} bytes is too long")
    try:
        epoch, digest, listing = msgpack.unpackb(header)
        entries = [(str(name), str(dtype), tuple(int(n) for n in shape)) for name, dtype, shape in listing]
    except Exception as error:  # msgpack raises a dozen types on garbage
        raise StateError(f"unreadable header: {error}") from None
    if type(epoch) is not int or epoch < 0 or not isinstance(digest, str) or len(digest) != 64:
        raise StateError("header fields are out of range")
    return epoch, digest, entries


def _expected(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    expected: dict[str, torch.Tensor] = {f"param/{name}": p for name, p in module.named_parameters()}
    expected |= {f"buffer/{name}": b for name, b in module.named_buffers()}
    return expected | {f"optimizer/{i}": p for i, p in enumerate(_params_of(optimizer))}


def _check_listing(listing: Sequence[tuple[str, str, tuple[int, ...]]], expected: dict[str, torch.Tensor]) -> None:
    names = {name for name, _, _ in listing}
    if len(names) != len(listing):
        raise StateError("a tensor is listed twice")
    missing = [name for name in expected if not name.startswith("optimizer/") and name not in names]
    if missing:
        raise StateError(f"tensor {missing[0]} is missing")
    entries: dict[str, int] = {}
    for name, dtype, shape in listing:
        kind, _, rest = name.partition("/")
        key = f"optimizer/{rest.partition('/')[0]}" if kind == "optimizer" else name
        if key not in expected or dtype not in _DTYPES or any(n < 0 for n in shape):
            raise StateError(f"unexpected tensor {name[:80]}")
        own = expected[key]
        entries[key] = entries.get(key, 0) + 1
        if kind == "optimizer":
            fits = shape in ((), tuple(own.shape)) or len(shape) <= own.dim() and 0 < math.prod(shape) <= own.numel()
            if not fits or entries[key] > _MAX_ENTRIES_PER_PARAM:
                raise StateError(f"optimizer state {name[:80]} is larger than its param")
        elif shape != tuple(own.shape) or _DTYPES[dtype] != own.dtype:
            raise StateError(f"{name[:80]} is {dtype}{list(shape)} there and {own.dtype}{list(own.shape)} here")


def _check_optimizer(listing: Sequence[tuple[str, str, tuple[int, ...]]], optimizer: torch.optim.Optimizer) -> None:
    """An optimizer that has state already says what it needs, to the letter."""
    theirs = {name: (dtype, shape) for name, dtype, shape in listing if name.startswith("optimizer/")}
    own = {
        f"optimizer/{index}/{key}": torch.as_tensor(value)
        for index, param in enumerate(_params_of(optimizer))
        for key, value in optimizer.state.get(param, {}).items()
        if value is not None
    }
    if own and theirs and theirs != {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in own.items()}:
        raise StateError("the peer's optimizer state is not of the kind that is held here")


def _digest_of(snapshot: Snapshot, module: torch.nn.Module) -> str:
    return _digest((name, snapshot.tensors[f"param/{name}"]) for name, _ in module.named_parameters())


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash over the hashes of pieces, which all cores compute together (hashlib lets other threads run meanwhile)."""
    sha = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, tensor in tensors:
            raw = as_bytes(tensor)
            sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            pieces = [raw[start : start + _PIECE_BYTES] for start in range(0, len(raw), _PIECE_BYTES)]
            for piece in map(_sha256, pieces) if len(pieces) == 1 else pool.map(_sha256, pieces):
                sha.update(piece)
    return sha.hexdigest()


def _sha256(data: Any) -> bytes:
    return hashlib.sha256(data).digest()
