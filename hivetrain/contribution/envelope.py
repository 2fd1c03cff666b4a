"""The sealed envelope of a record: who signed it, what kind it is, where it lies, until when it counts, its payload.

Surprising fact: DHT key and expiration are signed too. Otherwise any peer that passes a record on could stretch it, or
put it in the place of another record of the same hotkey.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from hivetrain.contribution.fields import RecordError, check_name, unpack
from hivetrain.keys import SIGNATURE_BYTES, Hotkey, is_address, verify

MAX_KEY_BYTES = 640
_DOMAIN = b"hivetrain/contribution/2/envelope"


@dataclass(frozen=True)
class Envelope:
    """A verified envelope; its payload is not parsed yet."""

    kind: str
    key: str
    hotkey: str
    expires: float
    payload: bytes


def seal_envelope(
    kind: str, key: str, payload: bytes, hotkey: Hotkey, expires: float, limits: Mapping[str, int]
) -> bytes:
    """Signs a payload.

    Args:
        kind: one of those in ``limits``; part of what is signed.
        key: DHT key under which it lies; signed like the kind.
        payload: bytes of the record.
        hotkey: the key that signs.
        expires: DHT time, seconds.
        limits: most bytes of an envelope, by kind.
    """
    expires = float(expires)
    _check_expires(expires)
    check_name("key", key, MAX_KEY_BYTES)
    fields = [kind, key, hotkey.address, expires, payload]
    data: bytes = msgpack.packb([*fields, hotkey.sign(_message(fields))])
    _check_size(data, limits[kind])
    return data


def open_envelope(data: Any, limits: Mapping[str, int]) -> Envelope:
    """Verifies size, form and signature of an envelope of any kind in ``limits``. Raises RecordError."""
    if type(data) is not bytes:
        raise RecordError("a sealed record is bytes")
    _check_size(data, max(limits.values()))
    *fields, signature = unpack(data, 6)
    kind, key, hotkey, expires, payload = fields
    if type(kind) is not str or kind not in limits:
        raise RecordError("the sealed record is of no known kind")
    _check_size(data, limits[kind])
    check_name("key", key, MAX_KEY_BYTES)
    _check_expires(expires)
    if type(payload) is not bytes or type(signature) is not bytes or len(signature) != SIGNATURE_BYTES:
        raise RecordError("the sealed record's payload or signature has another form")
    if not is_address(hotkey):
        raise RecordError("the sealed record names no hotkey")
    if msgpack.packb([*fields, signature]) != data:
        raise RecordError("the sealed record is not in its canonical form")
    if not verify(hotkey, _message(fields), signature):
        raise RecordError("the sealed record's signature does not match")
    return Envelope(kind, key, hotkey, expires, payload)


def _message(fields: list[Any]) -> bytes:
    return _DOMAIN + msgpack.packb(fields)


def _check_size(data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise RecordError(f"the sealed record has {len(data)} bytes, more than {limit}")


def _check_expires(expires: Any) -> None:
    if type(expires) is not float or not math.isfinite(expires) or not 0 < expires < 2**53:
        raise RecordError("expires must be a finite positive number of seconds")
