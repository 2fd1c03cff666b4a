"""Records: what is signed comes back, and whatever else is sent is refused with a RecordError."""

import dataclasses
import hashlib
import math
import struct

import msgpack
import pytest

from hivetrain.contribution import record as records
from hivetrain.contribution.record import (
    MAX_RECORD_BYTES,
    MAX_REVEAL_BYTES,
    Contribution,
    Leaf,
    Position,
    RecordError,
    Reveal,
    RevealedLeaf,
    commitment,
    open_contribution,
    open_reveal,
    seal,
    sealed_by,
)
from hivetrain.keys import Hotkey, verify

KEY = Hotkey.from_seed(b"\x07" * 32)
SIGNED_FIRST = b"hivetrain/contribution/2/envelope"
PLACES = {"contribution": "run-1_work_7", "reveal": "run-1_reveal_7"}
EXPIRES = 1_800_000_000.25
NAN, INFINITE = struct.pack("<f", math.nan), struct.pack("<f", math.inf)


@pytest.fixture
def log(make_log):
    return make_log(5)


@pytest.fixture
def contribution(log, make_contribution):
    return make_contribution(log, KEY)


@pytest.fixture
def reveal(log):
    return log.reveal(b"\x11" * 32, (1, 4), run_id="run-1", hotkey=KEY.address, swarm_epoch=7)


def forge(kind: str, payload: bytes, key: Hotkey = KEY, expires: object = EXPIRES, place: object = None) -> bytes:
    """An envelope with a good signature over whatever is inside."""
    fields = [kind, PLACES[kind] if place is None else place, key.address, expires, payload]
    signature = key.sign(SIGNED_FIRST + msgpack.packb(fields))
    return msgpack.packb([*fields, signature])


def values_of(sealed: bytes) -> list:
    return msgpack.unpackb(msgpack.unpackb(sealed)[4])


def refuses(data: object) -> bool:
    """Whether all who read records refuse ``data`` with a RecordError."""
    for reads in (open_contribution, open_reveal):
        with pytest.raises(RecordError):
            reads(data)
    return True


def test_what_was_sealed_is_what_is_opened(contribution, reveal):
    kinds = {"contribution": (contribution, open_contribution), "reveal": (reveal, open_reveal)}
    for kind, (record, opens) in kinds.items():
        sealed = seal(record, KEY, EXPIRES)
        assert opens(sealed) == record
        assert sealed_by(sealed) == (KEY.address, PLACES[kind], EXPIRES)
        assert commitment(sealed) == hashlib.sha256(sealed).digest()


def test_the_bytes_of_a_leaf_never_change():
    leaf = Leaf(24, 2.5, bytes(range(128)) * 8)
    assert leaf.to_bytes() == b"\x93\x18\xcb\x40\x04" + bytes(6) + b"\xc5\x04\x00" + bytes(range(128)) * 8
    assert leaf.hash == hashlib.sha256(b"\x00" + leaf.to_bytes()).digest()
    assert Leaf.from_bytes(leaf.to_bytes()) == leaf


def test_the_form_of_a_sealed_contribution_never_changes(contribution):
    fixed = dataclasses.replace(contribution, total=bytes(1024), root=bytes(32))
    kind, place, address, expires, payload, signature = msgpack.unpackb(seal(fixed, KEY, EXPIRES))
    assert (kind, place, address, expires) == ("contribution", "run-1_work_7", KEY.address, EXPIRES)
    assert verify(KEY.address, SIGNED_FIRST + msgpack.packb([kind, place, address, expires, payload]), signature)
    assert payload == msgpack.packb(
        [
            "run-1", KEY.address, "12D3KooWPeer", 7, "0123456789abcdef" * 4, contribution.rules, 1234,
            [0, 2, 1, 3], [0, 2, 1, 35], 5, 8, 40, 40, bytes(1024), bytes(32), "32-true",
        ]
    )  # fmt: skip


def test_one_kind_is_not_read_as_the_other(contribution, reveal):
    with pytest.raises(RecordError, match="is a contribution, not a reveal"):
        open_reveal(seal(contribution, KEY, EXPIRES))
    with pytest.raises(RecordError, match="is a reveal, not a contribution"):
        open_contribution(seal(reveal, KEY, EXPIRES))


def test_the_kind_is_signed(contribution):
    fields = msgpack.unpackb(seal(contribution, KEY, EXPIRES))
    assert refuses(msgpack.packb(["reveal", *fields[1:]]))


def test_the_expiration_is_signed(contribution):
    fields = msgpack.unpackb(seal(contribution, KEY, EXPIRES))
    fields[3] += 1
    with pytest.raises(RecordError, match="signature"):
        open_contribution(msgpack.packb(fields))
    with pytest.raises(RecordError, match="signature"):
        sealed_by(msgpack.packb(fields))


@pytest.mark.parametrize(
    "place", ["run-1_work_6", "run-2_work_7", "run-1_reveal_7", "run-1_scores_0", "", "x" * 641, 5]
)
def test_the_place_is_signed_and_must_be_the_records_own(contribution, place):
    fields = msgpack.unpackb(seal(contribution, KEY, EXPIRES))
    with pytest.raises(RecordError):
        sealed_by(msgpack.packb([fields[0], place, *fields[2:]]))
    with pytest.raises(RecordError, match="key"):
        open_contribution(forge("contribution", fields[4], place=place))


def test_a_reveal_is_refused_with_another_place(reveal):
    payload = msgpack.unpackb(seal(reveal, KEY, EXPIRES))[4]
    assert open_reveal(forge("reveal", payload)) == reveal
    with pytest.raises(RecordError, match="another DHT key"):
        open_reveal(forge("reveal", payload, place="run-1_work_7"))


def test_only_the_named_hotkey_can_seal(contribution, stranger):
    with pytest.raises(RecordError, match="the key is"):
        seal(contribution, stranger, EXPIRES)
    fields = msgpack.unpackb(seal(contribution, KEY, EXPIRES))
    with pytest.raises(RecordError, match="signature"):
        open_contribution(msgpack.packb([*fields[:2], stranger.address, *fields[3:]]))
    copied = forge("contribution", fields[4], stranger)
    assert sealed_by(copied)[0] == stranger.address
    with pytest.raises(RecordError, match="names another hotkey"):
        open_contribution(copied)


@pytest.mark.parametrize("expires", [math.nan, math.inf, -1.0, 0.0, 1e300])
def test_records_expire_at_a_real_time(contribution, expires):
    with pytest.raises(RecordError, match="expires"):
        seal(contribution, KEY, expires)
    with pytest.raises(RecordError, match="expires"):
        sealed_by(forge("contribution", b"", expires=expires))


WRONG = {
    "run_id": ["", "x" * 513, 5, None, b"run"],
    "hotkey": ["", "x" * 48, KEY.address[:-1], None],
    "peer_id": ["", "x" * 129, 3],
    "swarm_epoch": [-1, 2**53, 1.0, True, "7", None],
    "params_digest": ["", "a" * 63, "A" * 64, "g" * 64, b"a" * 64, 0],
    "rules": [b"", bytes(17), "x" * 16],
    "block": [-1, 2**53, 1.5],
    "first": [None, (0, 2, 1, 3), Position(0, 2, 1, 40)],
    "last": [None, Position(0, 2, 1, 3), Position(0, 0, 0, 0)],
    "microbatches": [0, -5, 65537, 4, 6, True],
    "batch_size": [0, 65537, 7, 8.0],
    "samples": [0, 39, 41, 400, 10**9],
    "span": [39, 81, -40, 10**15, 8],
    "total": [b"", bytes(1023), NAN * 256, bytes(1020) + INFINITE, "x" * 1024],
    "root": [b"", bytes(31), None],
    "precision": ["", "x" * 33, 32],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_contribution_out_of_range_exists_neither_here_nor_there(contribution, field, value):
    with pytest.raises(RecordError):
        dataclasses.replace(contribution, **{field: value})
    values = values_of(seal(contribution, KEY, EXPIRES))
    at = [item.name for item in dataclasses.fields(Contribution)].index(field)
    values[at] = dataclasses.astuple(value) if isinstance(value, Position) else value
    if field == "first" and value == (0, 2, 1, 3):
        values[at] = [0, 2, 1]  # as bytes, a tuple of four is a position
    with pytest.raises(RecordError):
        open_contribution(forge("contribution", msgpack.packb(values)))


def test_every_field_of_a_contribution_was_tried():
    assert set(WRONG) == {item.name for item in dataclasses.fields(Contribution)}


def test_a_single_microbatch_begins_and_ends_at_one_position(make_log, make_contribution):
    single = make_contribution(make_log(1), KEY)
    assert single.first == single.last
    with pytest.raises(RecordError, match="contradict"):
        dataclasses.replace(single, last=Position(0, 2, 1, 4))
    assert dataclasses.replace(single, span=16, last=Position(0, 2, 1, 11)).span == 16  # one was left out before it


def test_positions_sort_as_the_stream_runs():
    rising = [Position(0, 0, 0, 5), Position(0, 0, 1, 0), Position(0, 1, 0, 0), Position(1, 0, 0, 0)]
    assert sorted(reversed(rising)) == rising
    for wrong in (-1, 2**53, 1.0, True, None):
        with pytest.raises(RecordError):
            Position(0, 0, 0, wrong)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 0.1, 1e39, 2, None, "2"])
def test_a_leafs_loss_is_a_finite_fp32_number(loss):
    with pytest.raises(RecordError, match="loss"):
        Leaf(0, loss, bytes(1024))


def test_leaves_out_of_form_are_refused():
    good = Leaf(24, 2.5, bytes(1024)).to_bytes()
    wrong = [
        b"",
        good[:-1],
        good + b"\x00",
        b"\x93\xcc\x18" + good[2:],  # 24 in two bytes
        msgpack.packb([24, 2.5, bytes(1023)]),
        msgpack.packb([24, 2.5, NAN * 256]),
        msgpack.packb([-1, 2.5, bytes(1024)]),
        msgpack.packb([24, 2.5, bytes(1024), 0]),
        msgpack.packb({0: 24, 1: 2.5, 2: bytes(1024)}),
        "text",
        None,
    ]
    for data in wrong:
        with pytest.raises(RecordError):
            Leaf.from_bytes(data)


def test_reveals_out_of_form_are_refused(reveal):
    leaf = Leaf(0, 1.0, bytes(1024))
    one = RevealedLeaf(0, leaf, ())
    for leaves in ((), (one, one), (RevealedLeaf(1, leaf, ()), one), [one], (leaf,), None):
        with pytest.raises(RecordError):
            dataclasses.replace(reveal, leaves=leaves)
    with pytest.raises(RecordError, match="1 to 8 leaves"):
        dataclasses.replace(reveal, leaves=tuple(RevealedLeaf(i, leaf, ()) for i in range(9)))
    for index, path in ((-1, ()), (65536, ()), (0, (bytes(31),)), (0, (bytes(32),) * 17), (0, [bytes(32)])):
        with pytest.raises(RecordError):
            RevealedLeaf(index, leaf, path)
    values = values_of(seal(reveal, KEY, EXPIRES))
    for leaves in (None, 5, [], [5], [[0]], [[0, [], []]], [[0, 5, []]], [[0, [0, 1.0, bytes(1024)], 5]]):
        with pytest.raises(RecordError):
            open_reveal(forge("reveal", msgpack.packb([*values[:4], leaves])))


def test_the_largest_records_fit(contribution):
    leaf = Leaf(2**53 - 1, -3.0, bytes(1024))
    leaves = tuple(RevealedLeaf(65528 + i, leaf, (bytes(32),) * 16) for i in range(8))
    reveal = Reveal("x" * 512, KEY.address, 2**53 - 1, bytes(32), leaves)
    assert open_reveal(seal(reveal, KEY, EXPIRES)) == reveal
    longest = {"run_id": "x" * 512, "peer_id": "y" * 128, "precision": "z" * 32, "block": 2**53 - 1}
    record = dataclasses.replace(contribution, **longest)
    assert open_contribution(seal(record, KEY, EXPIRES)) == record


def test_large_records_are_refused_before_they_are_parsed(monkeypatch):
    def parsed(*_: object) -> None:
        raise AssertionError("a record above the limit was parsed")

    monkeypatch.setattr("hivetrain.contribution.envelope.unpack", parsed)
    for data in (bytes(MAX_REVEAL_BYTES + 1), forge("reveal", bytes(MAX_REVEAL_BYTES))):
        assert refuses(data)


def test_a_contribution_has_a_smaller_limit_than_a_reveal():
    payload = bytes(MAX_RECORD_BYTES)
    with pytest.raises(RecordError, match="more than 4096"):
        sealed_by(forge("contribution", payload))
    assert sealed_by(forge("reveal", payload)) == (KEY.address, PLACES["reveal"], EXPIRES)


def test_other_spellings_of_the_same_values_are_refused(contribution):
    sealed = seal(contribution, KEY, EXPIRES)
    kind, _, _, _, payload, _ = msgpack.unpackb(sealed)
    epoch_at = payload.index(contribution.peer_id.encode()) + len(contribution.peer_id)
    assert payload[epoch_at] == 7
    for spelling in (b"\xcc\x07", b"\xcd\x00\x07", b"\xd0\x07"):
        longer = payload[:epoch_at] + spelling + payload[epoch_at + 1 :]
        assert msgpack.unpackb(longer) == msgpack.unpackb(payload)
        with pytest.raises(RecordError, match="canonical"):
            open_contribution(forge("contribution", longer))
    with pytest.raises(RecordError):
        open_contribution(forge("contribution", payload + b"\xc0"))
    as_text = b"\x96\xd9" + bytes([len(kind)]) + sealed[2:]
    assert msgpack.unpackb(as_text) == msgpack.unpackb(sealed)
    with pytest.raises(RecordError, match="canonical"):
        sealed_by(as_text)


def test_keys_name_run_epoch_and_hotkey():
    assert records.work_key("run-1", 7) == "run-1_work_7"
    assert records.reveal_key("run-1", 7) == "run-1_reveal_7"
    assert records.hotkey_subkey(KEY.address) == b"hotkey:" + KEY.address.encode()
