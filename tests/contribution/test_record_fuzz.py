"""Garbage: whatever bytes arrive, readers of records raise a RecordError, soon and without much memory."""

import dataclasses
import random
import time
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.contribution.record import Contribution, Position, RecordError, open_contribution, open_reveal, seal
from hivetrain.keys import Hotkey

KEY = Hotkey.from_seed(b"\x07" * 32)
EXPIRES = 1_800_000_000.25
PLACES = {"contribution": "r_work_1", "reveal": "r_reveal_1"}


def forge(kind: str, payload: bytes, key: Hotkey = KEY, expires: object = EXPIRES) -> bytes:
    """An envelope with a good signature over whatever is inside."""
    fields = [kind, PLACES[kind], key.address, expires, payload]
    signature = key.sign(b"hivetrain/contribution/2/envelope" + msgpack.packb(fields))
    return msgpack.packb([*fields, signature])


def values_of(sealed: bytes) -> list:
    return msgpack.unpackb(msgpack.unpackb(sealed)[4])


def refuses(data: object) -> bool:
    """Whether all who read records refuse ``data`` with a RecordError."""
    for reads in (open_contribution, open_reveal):
        with pytest.raises(RecordError):
            reads(data)
    return True


def sealed_example() -> bytes:
    record = Contribution(
        "r", KEY.address, "p", 1, "0" * 64, bytes(16), 9, Position(0, 0, 0, 0), Position(0, 0, 0, 8), 2, 8, 16, 16,
        bytes(1024), bytes(32), "32-true",
    )  # fmt: skip
    return seal(record, KEY, EXPIRES)


SEALED = sealed_example()


def test_no_flipped_bit_passes(make_log):
    reveal = make_log(5).reveal(b"\x11" * 32, (1, 4), run_id="run-1", hotkey=KEY.address, swarm_epoch=7)
    flips = random.Random(3)
    for sealed in (SEALED, seal(reveal, KEY, EXPIRES)):
        for at in flips.sample(range(8 * len(sealed)), 400):
            data = bytearray(sealed)
            data[at // 8] ^= 1 << at % 8
            assert refuses(bytes(data))


def test_no_truncated_record_passes():
    for length in [*range(0, len(SEALED), 7), len(SEALED) - 1]:
        assert refuses(SEALED[:length])


@given(st.binary(max_size=3000))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(data):
    assert refuses(data)
    for kind, opens in (("contribution", open_contribution), ("reveal", open_reveal)):
        with pytest.raises(RecordError):
            opens(forge(kind, data))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=40)
    | st.text(max_size=9)
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=17) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=40,
)


@given(JUNK)
@settings(max_examples=300, deadline=None)
def test_values_of_other_types_are_refused(junk):
    assert refuses(junk)
    data = msgpack.packb(junk)
    assert refuses(data)
    for kind, opens in (("contribution", open_contribution), ("reveal", open_reveal)):
        with pytest.raises(RecordError):
            opens(forge(kind, data))


@given(st.integers(0, 15), JUNK)
@settings(max_examples=300, deadline=None)
def test_a_record_with_one_wrong_field_is_refused_or_differs(at, junk):
    values = values_of(SEALED)
    values[at] = junk
    sealed = forge("contribution", msgpack.packb(values))
    try:
        found = open_contribution(sealed)
    except RecordError:
        return
    assert msgpack.packb(dataclasses.astuple(found)) == msgpack.packb(values)


HUGE = {
    "nested lists": b"\x91" * 60_000,
    "nested maps": b"\x81\x01" * 30_000,
    "a list said to be huge": b"\xdd\xff\xff\xff\xff",
    "a huge list of nothing": b"\xdd\xff\xff\xff\xff" + b"\xc0" * 60_000,
    "huge bytes": b"\xc6\xff\xff\xff\xff" + bytes(60_000),
    "a huge text": b"\xdb\xff\xff\xff\xff" + bytes(60_000),
    "a huge map": b"\xdf\xff\xff\xff\xff",
    "an extension": b"\xc9\xff\xff\xff\xff\x05",
    "a time": b"\xc7\x0c\xff" + b"\xff" * 12,
    "no utf-8": b"\x95\xa2\xff\xff",
    "a wide list": b"\xdc\xea\x60" + b"\x01" * 60_000,
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE.keys())
def test_hostile_msgpack_costs_little_time_and_memory(data):
    tracemalloc.start()
    began = time.perf_counter()
    try:
        assert refuses(data)
        for kind, opens in (("contribution", open_contribution), ("reveal", open_reveal)):
            with pytest.raises(RecordError):
                opens(forge(kind, data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 1.0
    assert peak < 8 * 2**20
