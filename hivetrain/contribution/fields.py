"""Checks of single fields, shared by all records.

Surprising fact: types are compared with ``type(x) is``: to isinstance, True is an integer, and it would be packed as
another one.
"""

import math
import struct
from typing import Any

import msgpack
import numpy as np

from hivetrain.contribution.sketch import SKETCH_BYTES
from hivetrain.keys import is_address

MAX_INT = 2**53 - 1
_MAX_RUN_ID_BYTES = 512


class RecordError(ValueError):
    """Bytes or values that are no valid record; the message says which rule they break."""


def unpack(data: bytes, count: int) -> list[Any]:
    """The ``count`` values of a msgpack list; the caller has checked the size of ``data``.

    Raises:
        RecordError: it is anything else.
    """
    try:
        values = msgpack.unpackb(data, max_map_len=0, max_ext_len=0)
    except (Exception, RecursionError):  # msgpack raises a dozen types on garbage
        raise RecordError("this is not msgpack of the expected form") from None
    if type(values) is not list or len(values) != count:
        raise RecordError(f"a list of {count} fields was expected")
    return values


def check_head(run_id: Any, hotkey: Any, swarm_epoch: Any) -> None:
    """The fields that every record begins with."""
    check_name("run_id", run_id, _MAX_RUN_ID_BYTES)
    if not is_address(hotkey):
        raise RecordError("hotkey is not an address")
    check_int("swarm_epoch", swarm_epoch, 0, MAX_INT)


def check_int(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise RecordError(f"{name} must be an integer between {least} and {most}")


def check_fp32(name: str, value: Any) -> None:
    if type(value) is not float or not math.isfinite(value) or _as_fp32(value) != value:
        raise RecordError(f"{name} must be a finite fp32 number")


def check_name(name: str, value: Any, limit: int) -> None:
    try:
        fits = type(value) is str and 0 < len(value.encode()) <= limit
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise RecordError(f"{name} must be a text of 1 to {limit} bytes")


def check_digest(name: str, value: Any) -> None:
    if type(value) is not str or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise RecordError(f"{name} must be 64 hex digits")


def check_bytes(name: str, value: Any, size: int) -> None:
    if type(value) is not bytes or len(value) != size:
        raise RecordError(f"{name} must be {size} bytes")


def check_sketch(name: str, value: Any) -> None:
    check_bytes(name, value, SKETCH_BYTES)
    if not np.isfinite(np.frombuffer(value, dtype="<f4")).all():
        raise RecordError(f"{name} must hold finite numbers")


def _as_fp32(value: float) -> float | None:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return None
