import dataclasses

import msgpack
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils import get_dht_time
from synthetic import SETTINGS, hotkeys, status

from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.contribution.fields import RecordError
from hivetrain.contribution.record import hotkey_subkey
from hivetrain.contribution.scoreboard import (
    MAX_BOARD_BYTES,
    MinerScore,
    Scoreboard,
    open_scoreboard,
    scoreboard,
    scores_key,
    seal_scoreboard,
)
from hivetrain.keys import Hotkey
from hivetrain.monitor.reader import merge_page, parse_settings
from hivetrain.monitor.status import MAX_NOTES, MAX_STATUS_BYTES, EpochNote, RoundNote, Status
from hivetrain.scoring import Judged, Verdict, tempo_scores
from hivetrain.swarm.records import HotkeyRecords


def test_a_status_survives_the_wire():
    sent = status(3, 40, 5, hotkeys(1)[0], energy_j=12.5)
    assert Status.from_bytes(sent.to_bytes()) == sent
    assert len(sent.epochs) == len(sent.rounds) == 8


def test_a_loss_that_diverged_stays_one():
    received = Status.from_bytes(Status(1.0, 2, loss=float("nan"), epochs=(EpochNote(1, float("inf"), 4),)).to_bytes())
    assert received.loss != received.loss
    assert received.epochs[0].loss == float("inf")


def test_the_longest_status_fits_and_loses_its_oldest_notes_first():
    report = RoundReport(2**40, Outcome.INCOMPLETE, 500, 500, 0.5, 2**40, 9, 1.5, 1.5, 2**45, 2**45, "ü" * 500)
    rounds = tuple(RoundNote.of(2**40 + number, report) for number in range(MAX_NOTES))
    epochs = tuple(EpochNote(2**40 + number, 1.5, 2**40) for number in range(MAX_NOTES))
    full = Status(1e9, 2**41, 2.5, 2.5, 7, 2**50, 2**50, 1e9, "x" * 64, hotkeys(1)[0], 1e9, 1, 2, 3, epochs, rounds)
    data = full.to_bytes()
    assert len(data) <= MAX_STATUS_BYTES
    kept = Status.from_bytes(data)
    assert kept.rounds
    assert kept.rounds == rounds[-len(kept.rounds) :]
    assert kept.epochs == epochs[-len(kept.epochs) :]


def fields_of(**changes):
    values = msgpack.unpackb(status(0, 10, 2).to_bytes())
    names = ["form", *Status.__dataclass_fields__]
    for name, value in changes.items():
        values[names.index(name)] = value
    return msgpack.packb(values)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"x" * (MAX_STATUS_BYTES + 1),
        "text",
        None,
        msgpack.packb({"a": 1}),
        msgpack.packb([1] * 17),
        b"\x91" * 2000,
        fields_of(form=2),
        fields_of(swarm_epoch=-1),
        fields_of(swarm_epoch=True),
        fields_of(swarm_epoch=2**60),
        fields_of(tokens_per_s=float("nan")),
        fields_of(tokens_per_s=-1.0),
        fields_of(loss="low"),
        fields_of(loss=1e300),
        fields_of(energy_j=float("inf")),
        fields_of(device="x" * 65),
        fields_of(device=b"cpu"),
        fields_of(hotkey="<script>alert(1)</script>"),
        fields_of(epochs=[[1, 2.0, 3]] * (MAX_NOTES + 1)),
        fields_of(epochs=[[1, 2.0]]),
        fields_of(epochs=[[1, 2.0, -3]]),
        fields_of(rounds=[[0, 1, "won", 2, 2, 1.0, 8, 0.1, 0.1, 1, 1, ""]]),
        fields_of(rounds=[[0, 1, "averaged", 2, 2, 2.0, 8, 0.1, 0.1, 1, 1, ""]]),
        fields_of(rounds=[[0, 1, "averaged", 2, 2, 1.0, 8, 0.1, 0.1, 1, 1, "x" * 97]]),
        fields_of(rounds="rounds"),
    ],
)
def test_what_is_no_status_is_refused(data):
    with pytest.raises(RecordError):
        Status.from_bytes(data)


def test_a_status_as_it_should_be_is_not_refused():
    assert Status.from_bytes(fields_of()) == status(0, 10, 2)


def test_settings_are_believed_only_under_their_own_hash():
    assert parse_settings(SETTINGS.to_bytes(), SETTINGS.fingerprint) == SETTINGS
    assert parse_settings(SETTINGS.to_bytes(), b"x" * 16) is None
    assert parse_settings(b'{"model": 1}', SETTINGS.fingerprint) is None
    assert parse_settings(b"[" * 4000, SETTINGS.fingerprint) is None
    assert parse_settings(None, SETTINGS.fingerprint) is None


def test_settings_of_other_types_are_refused_even_under_their_own_hash():
    odd = dataclasses.replace(SETTINGS, target_batch_size="<b>many</b>")
    assert parse_settings(odd.to_bytes(), odd.fingerprint) is None


def board_of(number, validator):
    miners = hotkeys(number)
    judged = [
        Judged(hotkey, epoch, 8, Verdict.PASSED if epoch % 2 else Verdict.FAILED)
        for hotkey in miners
        for epoch in range(4)
    ]
    reasons = dict.fromkeys(miners, "Leaf 3 is not the gradient of its data. " * 9)
    shares = dict.fromkeys(miners, 1 / number)
    return scoreboard("run", validator.address, 980, tempo_scores(judged), dict.fromkeys(miners, 8.0), shares, reasons)


def read_back(sealed, run_id="run"):
    boards = {}
    for page, (_, data) in enumerate(sealed):
        merge_page(boards, open_scoreboard(data, run_id, page)[0], page)
    return boards


def test_a_scoreboard_of_256_miners_is_told_in_pages_that_the_dht_takes():
    validator = Hotkey.throwaway()
    board = board_of(256, validator)
    expires = get_dht_time() + 600
    sealed = seal_scoreboard(board, validator, expires)
    assert len(sealed) > 1
    for page, (key, data) in enumerate(sealed):
        assert key == scores_key("run", page)
        assert len(data) <= MAX_BOARD_BYTES
        place, subkey = DHTID.generate(source=key).to_bytes(), msgpack.packb(hotkey_subkey(validator.address))
        assert HotkeyRecords().validate(DHTRecord(place, subkey, msgpack.packb(data), expires))
        elsewhere = DHTID.generate(source=scores_key("run", page + 1)).to_bytes()
        assert not HotkeyRecords().validate(DHTRecord(elsewhere, subkey, msgpack.packb(data), expires))
    (found,) = read_back(sealed).values()
    assert {line.hotkey: line for line in found.miners} == {line.hotkey: line for line in board.miners}


def test_pages_of_a_run_with_the_longest_name_fit():
    validator = Hotkey.throwaway()
    board = dataclasses.replace(board_of(256, validator), run_id="r" * 512)
    assert len(seal_scoreboard(board, validator, get_dht_time() + 600)) > 1


def test_another_hotkey_cannot_write_a_validators_page():
    validator, other = Hotkey.throwaway(), Hotkey.throwaway()
    expires = get_dht_time() + 600
    ((key, data),) = seal_scoreboard(board_of(1, other), other, expires)
    place = DHTID.generate(source=key).to_bytes()
    record = DHTRecord(place, msgpack.packb(hotkey_subkey(validator.address)), msgpack.packb(data), expires)
    assert not HotkeyRecords().validate(record)
    with pytest.raises(RecordError, match="the key is"):
        seal_scoreboard(board_of(1, validator), other, expires)


def test_a_page_that_was_changed_or_moved_is_refused():
    validator = Hotkey.throwaway()
    ((_, data),) = seal_scoreboard(board_of(2, validator), validator, get_dht_time() + 600)
    assert open_scoreboard(data, "run", 0)[1] == 1
    for wrong in (data[:-1], data[:200] + b"x" + data[201:], b"", None):
        with pytest.raises(RecordError):
            open_scoreboard(wrong, "run", 0)
    for run_id, page in (("other", 0), ("run", 1)):
        with pytest.raises(RecordError, match="another run"):
            open_scoreboard(data, run_id, page)


def test_a_page_of_another_tempo_is_left_out():
    validator = hotkeys(1)[0]
    lines = [MinerScore(hotkey, 1, (), 1.0, 0.5) for hotkey in hotkeys(2)]
    boards = {}
    merge_page(boards, Scoreboard("run", validator, 10, (lines[0],)), 0)
    merge_page(boards, Scoreboard("run", validator, 9, (lines[1],)), 1)
    assert boards[validator].miners == (lines[0],)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 1.5},
        {"weight": float("nan")},
        {"average": -1.0},
        {"samples": -1},
        {"hotkey": "me"},
        {"reason": "x" * 121},
    ],
)
def test_a_line_out_of_range_is_refused(change):
    with pytest.raises(RecordError):
        MinerScore(**({"hotkey": hotkeys(1)[0], "samples": 1, "verdicts": (), "average": 1.0, "weight": 0.5} | change))
