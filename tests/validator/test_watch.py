"""What others learn of a validator: metrics, and the scores that it publishes."""

from prometheus_client import generate_latest
from small_economy import RUN, TEMPO, Miner, T, epoch_of

from hivetrain.contribution.audit import Verdict
from hivetrain.contribution.record import hotkey_subkey
from hivetrain.contribution.scoreboard import open_scoreboard, scores_key
from hivetrain.keys import Hotkey
from hivetrain.metrics.server import new_registry
from hivetrain.metrics.validator import ValidatorMetrics
from hivetrain.scoring import tempo_scores
from hivetrain.validator.bulletin import Bulletin
from hivetrain.validator.run import SwarmFault
from hivetrain.validator.tempos import Status
from hivetrain.validator.validator import Validator
from hivetrain.validator.watch import Watchers


def watched(station, *watchers):
    admission = station.validator._poller._admission
    return Validator(
        station.chain, station.run, station.state, admission, station.auditor, station.options, T,
        watcher=Watchers(watchers),
    )  # fmt: skip


def test_metrics_and_scores_tell_what_was_judged(world, station):
    honest, silent = Miner(world, "honest"), Miner(world, "silent", reveals=False)
    registry = new_registry("validator")
    stored = {}

    def store(key, subkey, sealed, expires):
        stored[key, subkey] = sealed
        return True

    station.validator = watched(
        station, ValidatorMetrics(registry, Verdict, Status), Bulletin(RUN, station.hotkey, store, 60)
    )
    unpaid = Miner(world, "unpaid")
    honest.contribute()
    unpaid.mine()
    world.finish_epoch(honest, unpaid)
    while not station.on_chain():
        assert world.block < 10 * TEMPO
        epoch_of(world, honest, silent, stations=[station])
    text = generate_latest(registry).decode()
    for name in ("polls", "audits"):
        assert f"hivetrain_validator_{name[:-1]}_seconds_count 0.0" not in text
    judged = station.state.database.rows(
        "SELECT verdict, count(*) FROM records WHERE verdict NOT NULL GROUP BY verdict"
    )
    for verdict, number in judged:
        assert f'hivetrain_validator_contributions_total{{verdict="{verdict}"}} {float(number)}' in text
    agree, none = station.state.database.one("SELECT sum(sum_error <= sum_tolerance), sum(unrecorded) FROM rounds")
    assert f'hivetrain_validator_rounds_total{{sums="agrees"}} {float(agree)}' in text
    assert none == 1
    assert 'hivetrain_validator_rounds_total{sums="unchecked"} 1.0' in text
    assert 'hivetrain_validator_weights_total{status="set"} 1.0' in text
    board, pages = open_scoreboard(stored[scores_key(RUN, 0), hotkey_subkey(station.hotkey.address)], RUN, 0)
    lines = {line.hotkey: line for line in board.miners}
    assert pages == 1
    assert lines[honest.address].weight == 1
    assert lines[silent.address].weight == 0
    assert "no reveal" in lines[silent.address].reason


def test_scores_that_cannot_be_published_change_nothing():
    def store(*_):
        raise SwarmFault("nobody is there")

    Bulletin(RUN, Hotkey.throwaway(), store, 60).scored(5, tempo_scores([]), {}, {}, {})
