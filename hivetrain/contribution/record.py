"""The two records a miner signs: a contribution before the exchange, and a reveal of the leaves that were drawn.

Surprising fact: a record that exists is a valid one. The constructors check every rule that needs no other record, so a
miner cannot sign by mistake what validators would refuse, and whoever holds a ``Contribution`` may trust its ranges.
"""

import hashlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import msgpack
import torch

from hivetrain.contribution import fields, merkle
from hivetrain.contribution.envelope import open_envelope, seal_envelope
from hivetrain.contribution.fields import MAX_INT
from hivetrain.contribution.fields import RecordError as RecordError
from hivetrain.contribution.rules import MAX_LEAVES
from hivetrain.contribution.sketch import SKETCH_BYTES, sketch_vector
from hivetrain.keys import Hotkey

MAX_RECORD_BYTES = 4 * 1024
MAX_REVEAL_BYTES = 64 * 1024
MAX_MICROBATCHES = MAX_BATCH_SIZE = 65536
_MAX_DEPTH = (MAX_MICROBATCHES - 1).bit_length()
_CONTRIBUTION, _REVEAL = "contribution", "reveal"
_LIMITS = {_CONTRIBUTION: MAX_RECORD_BYTES, _REVEAL: MAX_REVEAL_BYTES, "scores": 14 * 1024}  # scoreboard.py


@dataclass(frozen=True, order=True)
class Position:
    """A block in a slot's stream; later blocks compare greater. The fields are those of the data module's cursor."""

    data_pass: int
    window: int
    place: int
    block: int

    def __post_init__(self) -> None:
        for name in ("data_pass", "window", "place", "block"):
            fields.check_int(name, getattr(self, name), 0, MAX_INT)


@dataclass(frozen=True)
class Leaf:
    """One microbatch.

    Args:
        offset: blocks of the stream between the contribution's first block and this microbatch's.
        loss: mean loss, a number that fp32 holds exactly.
        sketch: of the mean gradient, ``SKETCH_BYTES`` long.
    """

    offset: int
    loss: float
    sketch: bytes

    def __post_init__(self) -> None:
        fields.check_int("offset", self.offset, 0, MAX_INT)
        fields.check_fp32("loss", self.loss)
        fields.check_sketch("sketch", self.sketch)

    def to_bytes(self) -> bytes:
        return _pack(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Leaf":
        """Parses a leaf. Raises RecordError on anything that is not one."""
        if type(data) is not bytes or len(data) > SKETCH_BYTES + 64:
            raise RecordError("a leaf has too many bytes")
        leaf = cls(*fields.unpack(data, 3))
        if leaf.to_bytes() != data:
            raise RecordError("a leaf is not in its canonical form")
        return leaf

    @property
    def hash(self) -> bytes:
        """What the Merkle tree is built over."""
        return merkle.leaf_hash(self.to_bytes())

    @property
    def vector(self) -> torch.Tensor:
        """The sketch, (256,) fp32."""
        return sketch_vector(self.sketch)


@dataclass(frozen=True)
class Contribution:
    """What a miner says it did in one swarm_epoch, signed before the exchange.

    Args:
        run_id: the run.
        hotkey: address that signs and is paid.
        peer_id: libp2p identity with which it takes part in the exchange, base58.
        swarm_epoch: global updates before this one.
        params_digest: of the params that the gradients were taken at, 64 hex digits.
        rules: fingerprint of the miner's audit rules, 16 bytes.
        block: the chain's block when this was made.
        first: first block of the first microbatch.
        last: first block of the last microbatch.
        microbatches: number of leaves.
        batch_size: blocks in each microbatch.
        samples: blocks in all of them.
        span: blocks of the stream from ``first`` to the end of the last microbatch, left-out ones included.
        total: sum of the leaves' sketches, each times ``batch_size``; ``SKETCH_BYTES`` long.
        root: of the Merkle tree over the leaves.
        precision: in which the gradients were computed, in Lightning's words.
    """

    run_id: str
    hotkey: str
    peer_id: str
    swarm_epoch: int
    params_digest: str
    rules: bytes
    block: int
    first: Position
    last: Position
    microbatches: int
    batch_size: int
    samples: int
    span: int
    total: bytes
    root: bytes
    precision: str

    def __post_init__(self) -> None:
        fields.check_head(self.run_id, self.hotkey, self.swarm_epoch)
        fields.check_name("peer_id", self.peer_id, 128)
        fields.check_digest("params_digest", self.params_digest)
        fields.check_bytes("rules", self.rules, 16)
        fields.check_int("block", self.block, 0, MAX_INT)
        fields.check_int("microbatches", self.microbatches, 1, MAX_MICROBATCHES)
        fields.check_int("batch_size", self.batch_size, 1, MAX_BATCH_SIZE)
        fields.check_int("samples", self.samples, 1, MAX_INT)
        fields.check_int("span", self.span, 1, MAX_INT)
        if type(self.first) is not Position or type(self.last) is not Position:
            raise RecordError("first and last must be positions")
        fields.check_sketch("total", self.total)
        fields.check_bytes("root", self.root, merkle.HASH_BYTES)
        fields.check_name("precision", self.precision, 32)
        if self.samples != self.microbatches * self.batch_size:
            raise RecordError("samples must be microbatches * batch_size")
        if not self.samples <= self.span <= 2 * self.samples:
            raise RecordError("span must lie between samples and twice as many: too many microbatches were left out")
        if self.first > self.last or (self.first == self.last) != (self.span == self.batch_size):
            raise RecordError("first, last and span contradict each other")

    @classmethod
    def _parse(cls, payload: bytes) -> "Contribution":
        values = fields.unpack(payload, 16)
        values[7:9] = (_position(value) for value in values[7:9])
        return cls(*values)


@dataclass(frozen=True)
class RevealedLeaf:
    """Leaf number ``index`` of a contribution, with its Merkle path."""

    index: int
    leaf: Leaf
    path: tuple[bytes, ...]

    def __post_init__(self) -> None:
        fields.check_int("index", self.index, 0, MAX_MICROBATCHES - 1)
        if type(self.leaf) is not Leaf:
            raise RecordError("a revealed leaf has no leaf")
        if type(self.path) is not tuple or len(self.path) > _MAX_DEPTH:
            raise RecordError(f"a path has at most {_MAX_DEPTH} hashes")
        for part in self.path:
            fields.check_bytes("path", part, merkle.HASH_BYTES)


@dataclass(frozen=True)
class Reveal:
    """The leaves that the beacon drew, signed.

    Args:
        run_id: the run.
        hotkey: address that signs.
        swarm_epoch: of the contribution.
        commitment: of the contribution's sealed bytes, 32 bytes.
        leaves: in rising order.
    """

    run_id: str
    hotkey: str
    swarm_epoch: int
    commitment: bytes
    leaves: tuple[RevealedLeaf, ...]

    def __post_init__(self) -> None:
        fields.check_head(self.run_id, self.hotkey, self.swarm_epoch)
        fields.check_bytes("commitment", self.commitment, 32)
        if type(self.leaves) is not tuple or not 1 <= len(self.leaves) <= MAX_LEAVES:
            raise RecordError(f"a reveal has 1 to {MAX_LEAVES} leaves")
        if any(type(leaf) is not RevealedLeaf for leaf in self.leaves):
            raise RecordError("a reveal holds something else than leaves")
        indices = [leaf.index for leaf in self.leaves]
        if indices != sorted(set(indices)):
            raise RecordError("a reveal's leaves must be distinct and in rising order")

    @classmethod
    def _parse(cls, payload: bytes) -> "Reveal":
        run_id, hotkey, swarm_epoch, commitment, entries = fields.unpack(payload, 5)
        if type(entries) is not list or len(entries) > MAX_LEAVES:
            raise RecordError(f"a reveal has 1 to {MAX_LEAVES} leaves")
        return cls(run_id, hotkey, swarm_epoch, commitment, tuple(_revealed_leaf(entry) for entry in entries))


def seal(record: Contribution | Reveal, hotkey: Hotkey, expires: float) -> bytes:
    """The signed bytes that go into the DHT.

    Args:
        record: whose ``hotkey`` is that of the key.
        hotkey: the key that signs.
        expires: DHT time at which the record is forgotten, seconds.
    """
    if record.hotkey != hotkey.address:
        raise RecordError(f"the record is of hotkey {record.hotkey}, the key is {hotkey.address}")
    kind, key = (_CONTRIBUTION, work_key) if isinstance(record, Contribution) else (_REVEAL, reveal_key)
    place = key(record.run_id, record.swarm_epoch)
    return seal_envelope(kind, place, _pack(record), hotkey, expires, _LIMITS)


def open_contribution(data: bytes) -> Contribution:
    """Parses and verifies a sealed contribution. Raises RecordError on anything that is not one."""
    return _open(data, Contribution, _CONTRIBUTION, work_key)


def open_reveal(data: bytes) -> Reveal:
    """Parses and verifies a sealed reveal. Raises RecordError on anything that is not one."""
    return _open(data, Reveal, _REVEAL, reveal_key)


def sealed_by(data: Any) -> tuple[str, str, float]:
    """Address that signed these bytes, their DHT key and expiration; checks size and signature, not the payload.

    Raises:
        RecordError: they are no sealed record.
    """
    envelope = open_envelope(data, _LIMITS)
    return envelope.hotkey, envelope.key, envelope.expires


def commitment(sealed: bytes) -> bytes:
    """SHA-256 of a sealed record: what the miner's offer to a round carries, 32 bytes."""
    return hashlib.sha256(sealed).digest()


def work_key(run_id: str, swarm_epoch: int) -> str:
    """DHT key under which the contributions of an epoch lie, by hotkey."""
    return f"{run_id}_work_{swarm_epoch}"


def reveal_key(run_id: str, swarm_epoch: int) -> str:
    """DHT key under which the reveals of an epoch lie, by hotkey."""
    return f"{run_id}_reveal_{swarm_epoch}"


def hotkey_subkey(address: str) -> bytes:
    """The only DHT subkey that a hotkey may write."""
    return b"hotkey:" + address.encode()


def _open(data: bytes, record: Any, kind: str, key: Callable[[str, int], str]) -> Any:
    envelope = open_envelope(data, _LIMITS)
    if envelope.kind != kind:
        raise RecordError(f"this is a {envelope.kind}, not a {kind}")
    found = record._parse(envelope.payload)
    if found.hotkey != envelope.hotkey:
        raise RecordError("the record names another hotkey than the one that signed it")
    if envelope.key != key(found.run_id, found.swarm_epoch):
        raise RecordError("the record is sealed for another DHT key than its own")
    if _pack(found) != envelope.payload:
        raise RecordError("the record is not in its canonical form")
    return found


def _pack(record: Any) -> bytes:
    data: bytes = msgpack.packb(astuple(record))
    return data


def _position(value: Any) -> Position:
    if type(value) is not list or len(value) != 4:
        raise RecordError("a position is four numbers")
    return Position(*value)


def _revealed_leaf(value: Any) -> RevealedLeaf:
    if type(value) is not list or len(value) != 3 or any(type(part) is not list for part in value[1:]):
        raise RecordError("a revealed leaf is a number, a leaf and a path")
    index, leaf, path = value
    if len(leaf) != 3:
        raise RecordError("a leaf has 3 fields")
    return RevealedLeaf(index, Leaf(*leaf), tuple(path))
