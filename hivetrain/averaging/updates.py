"""The last global updates, kept for those who follow the run without taking part in it.

Who holds the params of an epoch and its averaged gradient can make the optimizer step itself and compare digests. So an
update needs no trust: a false one leads to params that no peer has.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from hivetrain.averaging.group import MAX_COMMITMENT_BYTES, MAX_MEMBERS
from hivetrain.averaging.report import Member
from hivetrain.averaging.state import StateError

MAX_HEADER_BYTES = 2**18
MAX_KEPT = 64


@dataclass(frozen=True)
class Update:
    """One committed global update.

    Attributes:
        epoch: the swarm epoch that it ended.
        members: whose gradients are in it, with the weights that they had.
        average: the averaged gradient before clipping, shape (n,), fp32 on CPU; None if only the rest is known.
    """

    epoch: int
    members: tuple[Member, ...]
    average: torch.Tensor | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """Averaging weight of each member."""
        return tuple(member.weight for member in self.members)

    def header(self) -> bytes:
        """Everything but the average; equal on all honest members."""
        listing = [[m.peer_id, m.samples, m.weight, m.commitment] for m in self.members]
        return msgpack.packb([self.epoch, listing])

    @classmethod
    def parse_header(cls, data: bytes) -> "Update":
        """Reads a header from a peer.

        Raises:
            StateError: it is not one.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise StateError(f"an update's header of {len(data)} bytes is too long")
        try:
            epoch, listing = msgpack.unpackb(data)
            members = tuple(_member(*entry) for entry in listing)
        except Exception as error:  # msgpack raises a dozen types on garbage
            raise StateError(f"unreadable header of an update: {error}") from None
        if type(epoch) is not int or not 0 <= epoch < 2**53 or len(members) > MAX_MEMBERS:
            raise StateError("an update's header is out of range")
        return cls(epoch, members)


@dataclass(frozen=True)
class Followed:
    """A swarm epoch that has ended, as seen by somebody who follows the run.

    Attributes:
        epoch: its number.
        params_digest: SHA-256, hex, of the params that its gradients are of; "" if unknown.
        update: what ended it; None if it could not be followed. Without average where it comes from disk.
    """

    epoch: int
    params_digest: str
    update: Update | None


class UpdateLog:
    """Keeps the latest updates in memory; safe on any thread.

    Args:
        limit_bytes: bytes of averages to keep at most; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._updates: OrderedDict[int, Update] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, epoch: int, members: tuple[Member, ...], average: torch.Tensor) -> None:
        """Keeps a copy of the update that ended ``epoch``, and lets go of the oldest ones."""
        size_bytes = average.numel() * average.element_size()
        if not members or size_bytes > self._limit_bytes:
            return
        update = Update(epoch, members, average.detach().cpu().clone())
        with self._lock:
            self._updates.pop(epoch, None)
            self._updates[epoch] = update
            while len(self._updates) > min(MAX_KEPT, self._limit_bytes // max(1, size_bytes)):
                self._updates.popitem(last=False)

    def get(self, epoch: int) -> Update | None:
        """The update that ended ``epoch``, if it is still here."""
        with self._lock:
            return self._updates.get(epoch)


def _member(peer_id: Any, samples: Any, weight: Any, commitment: Any) -> Member:
    if not isinstance(peer_id, str) or len(peer_id) > 128 or not isinstance(commitment, bytes):
        raise ValueError("a member's fields have other types")
    if type(samples) is not int or not 0 < samples < 2**53 or len(commitment) > MAX_COMMITMENT_BYTES:
        raise ValueError("a member's samples or commitment are out of range")
    if not isinstance(weight, float) or not 0 <= weight < 2**53:
        raise ValueError("a member's weight is out of range")
    return Member(peer_id, samples, weight, commitment)
