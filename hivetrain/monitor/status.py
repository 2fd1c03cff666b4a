"""The status record: what one peer says of itself to whoever watches the run.

Surprising fact: nothing is decided by it. It is signed by its peer, but all of it is the peer's own word, so watchers
take medians and show the chain's and the validators' figures beside it.
"""

import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import msgpack

from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.contribution.fields import MAX_INT, RecordError, check_int, check_name, unpack
from hivetrain.keys import is_address

MAX_STATUS_BYTES = 2048
MAX_NOTES = 16
STATUS_TTL_S = 45.0
MAX_REASON_BYTES = 96
_FORM = 1  # first field of every record
_MAX_NUMBER = 1e15


def status_key(run_id: str) -> str:
    """DHT key under which the peers' status records lie."""
    return f"{run_id}_status"


@dataclass(frozen=True)
class EpochNote:
    """One peer's share of a swarm epoch.

    Args:
        epoch: its number.
        loss: mean over this peer's microbatches; not finite if it diverged, None if it had none.
        samples: of this peer.
    """

    epoch: int
    loss: float | None
    samples: int

    def __post_init__(self) -> None:
        check_int("epoch", self.epoch, 0, MAX_INT)
        _check_loss("loss", self.loss)
        check_int("samples", self.samples, 0, MAX_INT)


@dataclass(frozen=True)
class RoundNote:
    """One attempt at a global update as one peer saw it; the fields are those of ``RoundReport``.

    Args:
        number: how many attempts this peer had made before in this fit.
    """

    number: int
    epoch: int
    outcome: str
    group_size: int
    expected_peers: int
    fraction: float
    samples: int
    matchmaking_s: float
    exchange_s: float
    bytes_sent: int
    bytes_received: int
    reason: str

    def __post_init__(self) -> None:
        for name in ("number", "epoch", "samples", "bytes_sent", "bytes_received"):
            check_int(name, getattr(self, name), 0, MAX_INT)
        for name in ("group_size", "expected_peers"):
            check_int(name, getattr(self, name), 0, 2**16)
        for name, most in (("fraction", 1.0), ("matchmaking_s", 1e6), ("exchange_s", 1e6)):
            check_number(name, getattr(self, name), most)
        if self.outcome not in {str(outcome) for outcome in Outcome}:
            raise RecordError("outcome is none of those that exist")
        if self.reason:
            check_name("reason", self.reason, MAX_REASON_BYTES)

    @classmethod
    def of(cls, number: int, report: RoundReport) -> "RoundNote":
        """The note of a report."""
        return cls(
            number, report.swarm_epoch, str(report.outcome), report.group_size, report.expected_peers,
            float(report.fraction), report.samples, float(report.matchmaking_s), float(report.exchange_s),
            report.bytes_sent, report.bytes_received, clipped(report.reason, MAX_REASON_BYTES),
        )  # fmt: skip


@dataclass(frozen=True)
class Status:
    """One peer's record.

    Args:
        at: when it was made, seconds since 1970 by the peer's clock.
        swarm_epoch: finished global updates.
        loss: of the last microbatch; not finite if it diverged, None before the first.
        heldout_loss: on data that nobody trains on, None if it was not measured.
        heldout_epoch: the swarm epoch at which it was measured.
        samples: trained on in this fit.
        tokens: trained on in this fit.
        tokens_per_s: lately.
        device: what it trains on, for people.
        hotkey: address that it says is paid for its work; None without one.
        energy_j: joules used in this fit; None where the machine has no counter.
        data_pass: pass over the data in which its slot is.
        window: window of that pass.
        n_windows: windows of a pass; 0 if unknown.
        epochs: the last swarm epochs that ended, in order.
        rounds: the last attempts at an update, in order.
    """

    at: float
    swarm_epoch: int
    loss: float | None = None
    heldout_loss: float | None = None
    heldout_epoch: int = 0
    samples: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    device: str = "unknown"
    hotkey: str | None = None
    energy_j: float | None = None
    data_pass: int = 0
    window: int = 0
    n_windows: int = 0
    epochs: tuple[EpochNote, ...] = ()
    rounds: tuple[RoundNote, ...] = ()

    def __post_init__(self) -> None:
        for name in ("swarm_epoch", "heldout_epoch", "samples", "tokens", "data_pass", "window", "n_windows"):
            check_int(name, getattr(self, name), 0, MAX_INT)
        for name in ("loss", "heldout_loss"):
            _check_loss(name, getattr(self, name))
        check_number("at", self.at, 1e12)
        check_number("tokens_per_s", self.tokens_per_s, _MAX_NUMBER)
        if self.energy_j is not None:
            check_number("energy_j", self.energy_j, _MAX_NUMBER)
        check_name("device", self.device, 64)
        if self.hotkey is not None and not is_address(self.hotkey):
            raise RecordError("hotkey is not an address")
        if len(self.epochs) > MAX_NOTES or len(self.rounds) > MAX_NOTES:
            raise RecordError(f"a status has at most {MAX_NOTES} epochs and {MAX_NOTES} rounds")

    def to_bytes(self) -> bytes:
        """At most ``MAX_STATUS_BYTES``; the oldest rounds and epochs are left out where they do not fit."""
        status = self
        while len(data := msgpack.packb([_FORM, *astuple(status)])) > MAX_STATUS_BYTES:
            if len(status.rounds) >= len(status.epochs):
                status = replace(status, rounds=status.rounds[1:])
            else:
                status = replace(status, epochs=status.epochs[1:])
        return data

    @classmethod
    def from_bytes(cls, data: Any) -> "Status":
        """Parses a record. Raises RecordError on anything that is not one."""
        if type(data) is not bytes or len(data) > MAX_STATUS_BYTES:
            raise RecordError(f"a status is at most {MAX_STATUS_BYTES} bytes")
        form, *values, epochs, rounds = unpack(data, 17)
        if form != _FORM:
            raise RecordError("the status has a form that is unknown here")
        return cls(*[*values, _notes(EpochNote, epochs, 3), _notes(RoundNote, rounds, 12)])


def check_number(name: str, value: Any, most: float) -> None:
    """Raises RecordError unless it is a finite float from 0 to ``most``."""
    if type(value) is not float or not math.isfinite(value) or not 0 <= value <= most:
        raise RecordError(f"{name} must be a finite number between 0 and {most:g}")


def clipped(text: str, limit: int) -> str:
    """The text with at most so many bytes of UTF-8."""
    return text.encode(errors="replace")[:limit].decode(errors="ignore")


def _check_loss(name: str, value: Any) -> None:
    if value is not None and (type(value) is not float or (math.isfinite(value) and abs(value) > _MAX_NUMBER)):
        raise RecordError(f"{name} must be a number or nothing")


def _notes(kind: Any, entries: Any, count: int) -> tuple[Any, ...]:
    if type(entries) is not list or len(entries) > MAX_NOTES:
        raise RecordError(f"a status has at most {MAX_NOTES} epochs and {MAX_NOTES} rounds")
    if any(type(entry) is not list or len(entry) != count for entry in entries):
        raise RecordError("an epoch or round of a status has another form")
    return tuple(kind(*entry) for entry in entries)
