"""What is told about a miner, as JSON and as tables, also while the validator runs."""

import json

import pytest
from small_economy import AUDITS, TEMPO, Miner, epoch_of

from hivetrain.cli import main
from hivetrain.errors import UserError
from hivetrain.validator.explain import explain
from hivetrain.validator.schema import open_read_only

END = 2 * TEMPO - 2


def louder(loss, sketch, flat):
    return loss, sketch * 1.2, flat


@pytest.fixture
def judged(world, station):
    """An honest miner, a liar, one that is late once and absent from a round once; two tempos."""
    honest, liar, sloppy = Miner(world, "honest"), Miner(world, "liar", lie=louder), Miner(world, "sloppy")
    sloppy.mine()
    early = sloppy.record()
    for _ in range(AUDITS.beacon_lag):
        epoch_of(world, honest, liar, stations=[station])
    sloppy.begin()
    sloppy.mine(1)
    sloppy.publish(sloppy.record(block=early.block))
    station.round()
    honest.contribute(1)
    world.finish_epoch(honest, sloppy)
    honest.contribute()
    sloppy.contribute()
    station.round()
    world.finish_epoch(honest)
    while world.block <= END:
        epoch_of(world, honest, liar, sloppy, stations=[station])
    return honest, liar, sloppy


def told(station, hotkey):
    connection = open_read_only(station.path)
    try:
        return explain(connection, hotkey)
    finally:
        connection.close()


def test_each_factor_is_there_with_its_evidence(judged, station):
    honest, liar, sloppy = judged
    found = told(station, honest.address)
    assert (found["uid"], found["run_id"], found["validator"]) == (honest.slot, "run", station.hotkey.address)
    (tempo,) = found["tempos"]
    assert tempo["block"] == END
    assert tempo["samples"] == 2 * tempo["average"] == 2 * found["average"] > 0
    assert tempo["status"] == "set"
    assert found["weight"] == pytest.approx(station.on_chain()[honest.address], abs=1e-4)
    passed = [audit for audit in found["audits"] if audit["verdict"] == "passed"]
    for audit in passed:
        (leaf,) = audit["leaves"]
        assert [leaf["index"]] == audit["drawn"]
        assert leaf["sketch_error"] < 1e-6 < leaf["tolerance"]["sketch"]
        assert len(leaf["place"]) == 4
        assert audit["beacon_hash"].startswith("0x")
        assert audit["seen_block"] < audit["beacon_block"] < audit["due_block"]
    assert tempo["verdicts"]["passed"] == sum(audit["tempo"] == END for audit in passed) > 0
    assert found["verdicts"].get("failed", 0) == 0


def test_a_liar_sees_what_was_off_and_by_how_much(judged, station):
    _, liar, _ = judged
    found = told(station, liar.address)
    assert found["weight"] == found["average"] == 0
    assert found["tempos"][0]["forfeited"]
    failed = [audit for audit in found["audits"] if audit["verdict"] == "failed"]
    assert failed
    for audit in failed:
        assert audit["leaves"][0]["sketch_error"] == pytest.approx(0.2, rel=1e-3)
        assert "is not the gradient of its data" in audit["reason"]
    assert {entry["swarm_epoch"] for entry in found["rounds_flagged"]} >= {0, 1}
    assert all(entry["sum_error"] > entry["tolerance"] for entry in found["rounds_flagged"])


def test_rounds_that_were_not_compared_are_told_to_their_members(world, station, capsys):
    honest, other, unpaid = Miner(world, "honest"), Miner(world, "other"), Miner(world, "unpaid")
    epoch_of(world, honest, other, stations=[station])
    honest.contribute()
    unpaid.mine()
    station.round()
    world.finish_epoch(honest, unpaid)
    for _ in range(3):
        epoch_of(world, honest, other, stations=[station])
    assert told(station, honest.address)["rounds_unchecked"] == [{"swarm_epoch": 1, "unrecorded": 1}]
    assert told(station, other.address)["rounds_unchecked"] == []
    assert main(["why", honest.address, "--state", str(station.path)]) == 0
    assert "members without a record" in capsys.readouterr().out


def test_what_was_not_paid_is_named(judged, station):
    _, _, sloppy = judged
    found = told(station, sloppy.address)
    reasons = {record["verdict"]: record["reason"] for record in found["unpaid"]}
    assert "its beacon is block" in reasons["late"]
    assert "No committed round" in reasons["not exchanged"]


def test_the_beginning_of_an_address_is_enough_if_it_is_one_hotkey_s(judged, station):
    honest, liar, _ = judged
    length = next(n for n in range(1, 48) if honest.address[:n] != liar.address[:n])
    others = [miner.address for miner in judged if miner is not honest]
    while any(other.startswith(honest.address[:length]) for other in others):
        length += 1
    assert told(station, honest.address[:length])["hotkey"] == honest.address
    with pytest.raises(UserError, match="3 hotkeys begin with '5'"):
        told(station, "5")
    with pytest.raises(UserError, match="has seen nothing of a hotkey 'xyz'"):
        told(station, "xyz")
    with pytest.raises(UserError, match="hotkeys begin with ''"):
        told(station, "")


def test_the_command_prints_json_and_tables(judged, station, capsys):
    _, liar, sloppy = judged
    assert main(["why", liar.address[:12], "--state", str(station.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told(station, liar.address)
    assert main(["why", sloppy.address, "--state", str(station.path)]) == 0
    out = capsys.readouterr().out
    for part in (sloppy.address, "Tempos", "Audits", "Not paid", "late", "not exchanged", "Rounds whose average"):
        assert part in out
    assert main(["why", liar.address, "--state", str(station.path)]) == 0
    out = capsys.readouterr().out
    assert "0.2 of 0.02" in out
    assert "0, forfeited" in out


def test_numbers_that_json_does_not_have_are_words(judged, station, capsys):
    honest, _, _ = judged
    with station.state.transaction():
        station.state.database.write("UPDATE rounds SET sum_error = ?", float("inf"))
    assert main(["why", honest.address, "--state", str(station.path), "--json"]) == 0

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["rounds_flagged"][0]["sum_error"] == "inf"
    assert main(["why", honest.address, "--state", str(station.path)]) == 0


def test_a_missing_or_foreign_file_is_one_clear_line(world, tmp_path, capsys):
    assert main(["why", "5", "--state", str(tmp_path / "none.db")]) == 2
    assert "there is no state file" in capsys.readouterr().err
    assert main(["why", "5", "--state", str(world.path)]) == 2
    assert "is not a validator's state file" in capsys.readouterr().err
