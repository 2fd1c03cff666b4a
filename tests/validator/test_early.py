"""Who commits long before the others of its round could wait for its beacon, and choose: that earns nothing."""

import pytest
from small_economy import Miner, Station, drawn_of

from hivetrain.contribution.audit import Verdict
from hivetrain.contribution.rules import AuditRules

RULES = AuditRules(probability=0.5, leaves=2, beacon_lag=12, reveal_blocks=4)
PAID = (Verdict.PASSED, Verdict.NOT_DRAWN)


def invented(loss, sketch, flat):
    return loss, sketch.flip(0), flat


@pytest.fixture
def station(world):
    world.rules = RULES
    made = Station(world, "validator")
    yield made
    made.close()


def advance(world, station, blocks):
    for _ in range(blocks):
        world.advance()
        station.round()


def finish(world, station, *miners):
    """The exchange, and time for beacons and reveals."""
    station.round()
    world.finish_epoch(*miners)
    advance(world, station, RULES.beacon_lag + RULES.reveal_blocks + 2)


def test_a_miner_that_offers_only_what_its_beacon_spared_earns_nothing(world, station):
    honest, cheat = Miner(world, "honest"), Miner(world, "cheat", lie=invented)
    for _ in range(3):
        cheat.mine()
        while True:
            record = cheat.publish()
            advance(world, station, RULES.beacon_lag)
            if not drawn_of(world, record):
                break
        honest.contribute()
        finish(world, station, honest, cheat)
    rows = station.state.database.rows("SELECT verdict FROM records WHERE hotkey = ? AND exchanged", cheat.address)
    assert not rows
    assert list(station.verdicts(cheat).values()) == [Verdict.EARLY] * 3
    assert "another member of its round in block" in station.reasons(cheat)[-1]
    assert set(station.verdicts(honest).values()) <= set(PAID)


def test_members_may_commit_half_a_lag_apart(world, station):
    first, second = Miner(world, "first"), Miner(world, "second")
    first.contribute()
    advance(world, station, RULES.spread)
    second.contribute()
    finish(world, station, first, second)
    for miner in (first, second):
        assert station.verdicts(miner)[0] in PAID


@pytest.mark.parametrize("ahead", [2, 3, RULES.beacon_lag, 500])
def test_nobody_makes_others_early_by_naming_a_later_block(world, station, ahead):
    honest, liar = Miner(world, "honest"), Miner(world, "liar")
    honest.contribute()
    liar.mine()
    liar.publish(liar.record(block=world.block + ahead))
    finish(world, station, honest, liar)
    assert station.verdicts(honest)[0] in PAID
    assert (station.verdicts(liar)[0] == Verdict.INVALID) == (ahead > 2)


def test_a_validator_that_was_away_calls_nobody_early(world, station):
    station.round()
    honest, liar = Miner(world, "honest"), Miner(world, "liar")
    honest.contribute()
    liar.mine()
    liar.publish(liar.record(block=world.block + RULES.spread + 3))
    world.advance(RULES.spread + 3)
    finish(world, station, honest, liar)
    assert station.verdicts(honest)[0] in PAID
