"""What a validator makes of honest and dishonest miners, block by block."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from small_economy import AUDITS, FAR, RUN, START, TEMPO, Miner, Station, drawn_of, epoch_of

from hivetrain.contribution.audit import Verdict
from hivetrain.contribution.fields import MAX_INT
from hivetrain.contribution.record import Position, commitment, hotkey_subkey, seal, work_key
from hivetrain.contribution.rules import AuditRules
from hivetrain.data.errors import DataError
from hivetrain.keys import Hotkey

END = 2 * TEMPO - 2  # of the first tempo of scores after the chain's first epoch


def louder(loss, sketch, flat):
    """A sketch that is not that of its gradient."""
    return loss, sketch * 1.2, flat


def settle(world, *stations, blocks=8):
    for _ in range(blocks):
        world.advance()
        for station in stations:
            station.round()


def finish_epoch(world, station, *miners):
    """The rest of an epoch to which the miners have contributed."""
    station.round()
    world.finish_epoch(*miners)
    world.advance()
    station.round()


def publish_drawn(miner):
    """Publishes records of the same work, in one block after another, until the beacon draws one; returns that."""
    while True:
        record = miner.publish()
        miner.world.advance(AUDITS.beacon_lag)
        if drawn_of(miner.world, record):
            return record


def test_honest_miners_are_paid_by_their_samples_and_a_liar_gets_nothing(world, station):
    small, large, liar = Miner(world, "small"), Miner(world, "large"), Miner(world, "liar", lie=louder)
    while world.block < END:
        for miner, microbatches in ((small, 1), (large, 3), (liar, 2)):
            miner.contribute(microbatches)
        station.round()
        world.finish_epoch(small, large, liar)
        world.advance()
        station.round()
    assert set(station.verdicts(small).values()) <= {None, Verdict.PASSED, Verdict.NOT_DRAWN}
    assert {Verdict.PASSED, Verdict.NOT_DRAWN} <= set(station.verdicts(large).values())
    assert Verdict.FAILED in station.verdicts(liar).values()
    weights = station.on_chain()
    assert set(weights) == {small.address, large.address}
    assert abs(weights[large.address] - 0.75) < 1e-4
    assert [row[0] for row in station.tempos()] == [END]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_validator_that_replays_everything_itself_passes_the_honest_and_catches_the_liar(world, precision):
    real = Station(world, "real", replays=False)
    world.advance_to(TEMPO)
    honest, liar = Miner(world, "honest"), Miner(world, "liar", lie=louder)
    real.auditor._replayer.precision = precision
    for _ in range(3):
        epoch_of(world, honest, liar, stations=[real])
    settle(world, real)
    assert set(real.verdicts(honest).values()) <= {Verdict.PASSED, Verdict.NOT_DRAWN}
    assert Verdict.PASSED in real.verdicts(honest).values()
    assert set(real.verdicts(liar).values()) <= {Verdict.FAILED, Verdict.NOT_DRAWN}
    real.close()


def test_two_validators_agree_to_the_last_bit(world, station):
    other = Station(world, "other")
    world.advance_to(2 * TEMPO)
    miners = [Miner(world, "one"), Miner(world, "two"), Miner(world, "liar", lie=louder)]
    for number in range(TEMPO + 6):
        for miner in miners:
            miner.contribute(1 + (number + miner.slot) % 3)
        for each in (other, station) if number % 2 else (station, other):
            each.round()
        world.finish_epoch(*miners)
        world.advance()
        other.round()
        station.round()
    assert len(other.tempos()) == 1
    assert station.tempos()[-1] == other.tempos()[-1]
    assert station.on_chain() == other.on_chain() != {}
    other.close()


def test_a_validator_costs_one_load_of_params_for_each_epoch(world, station):
    miners = [Miner(world, name) for name in ("one", "two", "three")]
    for _ in range(4):
        epoch_of(world, *miners, stations=[station])
    settle(world, station)
    audited = {epoch for miner in miners for epoch, v in station.verdicts(miner).items() if v == Verdict.PASSED}
    assert station.auditor._replayer.loads <= len(audited) + 1


# Records that are not let in


def test_a_record_first_seen_after_its_beacon_is_late(world, station):
    miner = Miner(world, "miner")
    miner.mine()
    block = world.block
    for _ in range(AUDITS.beacon_lag):
        station.round()
        world.advance()
    miner.publish(miner.record(block=block))
    station.round()
    assert station.verdicts(miner) == {0: Verdict.LATE}
    assert station.reasons(miner) == [f"First seen in block {block + 2}; its beacon is block {block + 2}."]
    world.finish_epoch(miner)
    settle(world, station)
    assert station.verdicts(miner) == {0: Verdict.LATE}  # though a round has it


@pytest.mark.parametrize("past", [1, 20, 500])
def test_nobody_can_choose_a_beacon_that_is_known_by_naming_an_old_block(world, station, past):
    world.advance_to(3 * TEMPO)
    for _ in range(3):
        station.round()
        world.advance()
    miner = Miner(world, "miner")
    miner.mine()
    miner.publish(miner.record(block=max(0, world.block - AUDITS.beacon_lag - past)))
    station.round()
    assert station.verdicts(miner) == {0: Verdict.LATE}


def test_a_record_is_not_late_if_the_validator_was_away(world, station):
    miner = Miner(world, "miner")
    station.round()
    world.advance()
    miner.contribute()
    world.advance(AUDITS.beacon_lag + 1)
    station.round()
    world.finish_epoch(miner)
    settle(world, station)
    assert station.verdicts(miner)[0] in (Verdict.PASSED, Verdict.NOT_DRAWN)
    (note,) = station.state.database.one("SELECT note FROM records")
    assert "this validator was away" in note


WRONG = {
    "another run": (lambda miner: {"run_id": "other"}, "another run"),
    "another epoch": (lambda miner: {"swarm_epoch": 5}, "another run, swarm epoch"),
    "other rules": (lambda miner: {"rules": AuditRules(probability=0.1)}, "other audit rules"),
    "a precision that nobody can replay": (lambda miner: {"precision": "64-true"}, "cannot be audited"),
    "a block that does not exist": (lambda miner: {"block": miner.world.block + 100}, "does not exist"),
}


@pytest.mark.parametrize(("changes", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_record_that_cannot_be_judged_earns_nothing_and_forfeits_nothing(world, station, changes, reason):
    miner = Miner(world, "miner")
    miner.mine()
    sealed = seal(miner.record(**changes(miner)), miner.hotkey, FAR)
    miner.put(work_key(RUN, 0), sealed)
    station.round()
    assert station.verdicts(miner) == {0: Verdict.INVALID}
    assert reason in station.reasons(miner)[0]
    world.finish_epoch(miner)
    while world.block <= END:
        epoch_of(world, miner, stations=[station])
    assert station.on_chain() == {miner.address: 1}


def test_claims_that_nobody_could_replay_are_refused(world, station):
    miner = Miner(world, "miner")
    miner.mine(1)
    huge = replace(miner.record(), batch_size=64, samples=64, span=64)
    many = replace(miner.record(), microbatches=251, samples=1004, span=1004, last=Position(9, 0, 0, 0))
    for record, reason in ((huge, "microbatches have 64 blocks"), (many, "claims 1004 samples")):
        miner.put(work_key(RUN, 0), seal(record, miner.hotkey, FAR))
        station.round()
        assert station.verdicts(miner) == {0: Verdict.INVALID}
        assert any(reason in each for each in station.reasons(miner))


def test_signed_garbage_is_kept_as_invalid(world, station):
    miner = Miner(world, "miner")
    miner.mine()
    record = miner.publish()
    reveal = miner.log.reveal(commitment(b""), (0,), run_id=RUN, hotkey=miner.address, swarm_epoch=0)
    miner.put(work_key(RUN, 0), seal(reveal, miner.hotkey, FAR))  # a reveal where a contribution belongs
    station.round()
    assert station.verdicts(miner) == {record.swarm_epoch: Verdict.INVALID}
    assert "cannot be read" in station.reasons(miner)[0]


def test_a_stranger_leaves_no_trace(world, station):
    miner, unknown = Miner(world, "miner"), Hotkey.from_seed(b"u" * 32)
    miner.mine()
    sealed = seal(miner.record(hotkey=unknown.address), unknown, FAR)
    world.dht[work_key(RUN, 0)] = {hotkey_subkey(unknown.address): (sealed, FAR)}
    station.round()
    assert station.state.database.rows("SELECT * FROM records") == []


def test_a_hotkey_cannot_fill_the_state_with_records(world, station, monkeypatch):
    monkeypatch.setattr("hivetrain.validator.state.MOST_RECORDS", 3)
    miner = Miner(world, "miner")
    for _ in range(5):
        miner.contribute(1)
        station.round()
    assert len(station.state.database.rows("SELECT * FROM records")) == 3


# Rounds


def test_work_that_no_round_has_earns_nothing_and_forfeits_nothing(world, station):
    member, absent = Miner(world, "member"), Miner(world, "absent", reveals=False)
    member.contribute()
    absent.contribute()
    station.round()
    world.finish_epoch(member)
    settle(world, station)
    assert station.verdicts(absent) == {0: Verdict.NOT_EXCHANGED}
    assert station.verdicts(member)[0] in (Verdict.PASSED, Verdict.NOT_DRAWN)


def test_samples_and_peer_must_be_those_of_the_round(world, station):
    honest, more, other = Miner(world, "honest"), Miner(world, "more"), Miner(world, "other")
    for miner in (honest, more, other):
        miner.contribute()
    station.round()
    more.mine(1)  # it offers more than it committed to
    other.peer_id = "somebody else"
    world.finish_epoch(honest, more, other)
    settle(world, station)
    assert station.verdicts(more) == station.verdicts(other) == {0: Verdict.NOT_EXCHANGED}
    assert station.verdicts(honest)[0] in (Verdict.PASSED, Verdict.NOT_DRAWN)


def test_no_more_is_paid_than_moved_the_average(world, station):
    small, large = Miner(world, "small"), Miner(world, "large")
    while world.block <= END:
        for miner, microbatches in ((small, 2), (large, 6)):
            miner.contribute(microbatches)
        station.round()
        world.finish_epoch(small, large, cap=16)
        world.advance()
        station.round()
    weights = station.on_chain()
    assert weights[large.address] == pytest.approx(2 * weights[small.address], rel=1e-3)


def test_of_a_retried_round_the_record_counts_that_it_committed_to(world, station):
    miner = Miner(world, "miner")
    first = miner.contribute(1)
    station.round()
    world.advance(3)
    second = miner.contribute(1)
    station.round()
    world.finish_epoch(miner)
    settle(world, station)
    query = "SELECT samples, verdict FROM records ORDER BY samples"
    found = dict(map(tuple, station.state.database.rows(query)))
    assert found[first.samples] == Verdict.NOT_EXCHANGED
    assert found[second.samples] in (Verdict.PASSED, Verdict.NOT_DRAWN)


def test_an_epoch_that_could_not_be_followed_is_unjudged(world, station):
    miner, silent = Miner(world, "miner"), Miner(world, "silent", reveals=False)
    for each in (miner, silent):
        each.contribute()
    station.round()
    world.finish_epoch(miner, silent, followed=False)
    settle(world, station)
    assert station.verdicts(miner) == station.verdicts(silent) == {0: Verdict.UNJUDGED}


def test_work_on_other_params_is_invalid(world, station):
    miner = Miner(world, "miner")
    miner.mine()
    miner.publish(miner.record(params_digest="ab" * 32))
    station.round()
    world.finish_epoch(miner)
    settle(world, station)
    assert station.verdicts(miner) == {0: Verdict.INVALID}
    assert "other params" in station.reasons(miner)[0]


def test_data_are_not_sold_twice(world, station):
    miner = Miner(world, "miner")
    epoch_of(world, miner, stations=[station])
    miner.offset = 6  # in the middle of the first contribution's last microbatch
    epoch_of(world, miner, stations=[station])
    miner.offset = 8
    epoch_of(world, miner, stations=[station])
    settle(world, station)
    paid = (Verdict.PASSED, Verdict.NOT_DRAWN)
    found = station.verdicts(miner)
    assert found[0] in paid
    assert found[1] == Verdict.INVALID
    assert found[2] in paid
    assert "was paid up to" in station.reasons(miner)[1]


def test_data_behind_the_end_of_a_unit_are_not_sold_twice(world):
    world.rules = replace(AUDITS, probability=1.0)
    station, miner = Station(world, "strict"), Miner(world, "miner")
    unit = next(n for n in itertools.count() if world.reader.position_at(miner.slot, START, n)[:3] != START[:3])
    for offset in (unit - 2, unit, unit + 4):  # two blocks before the end and two behind it; those again; others
        miner.offset = offset
        miner.contribute(1)
        finish_epoch(world, station, miner)
    settle(world, station)
    assert list(station.verdicts(miner).values()) == [Verdict.PASSED, Verdict.INVALID, Verdict.PASSED]
    assert "was paid up to" in station.reasons(miner)[1]
    station.close()


def test_data_that_were_sold_in_a_later_epoch_are_not_sold_in_an_earlier_one(world, station):
    miner, sales = Miner(world, "miner"), station.state.sales
    miner.mine(1)
    early = miner.record()
    world.finish_epoch(miner)
    miner.offset = 3  # the last block of the earlier one
    miner.mine(1)
    with station.state.transaction():
        sales.add(miner.record())
    found = sales.objection(early)
    assert found.verdict == Verdict.INVALID
    assert found.reason == "It ends at 0/0/0/3, and was paid from 0/0/0/3 on later."
    miner.begin()
    miner.offset = 7
    miner.mine(1)
    assert sales.objection(replace(miner.record(), swarm_epoch=5)) is None


def test_a_last_microbatch_at_the_end_of_all_numbers_hinders_nobody(world, station):
    liar, miner = Miner(world, "liar"), Miner(world, "miner")
    for number in range(2):
        miner.contribute()
        liar.mine()
        honest = liar.record()
        liar.publish(honest if number else replace(honest, last=replace(honest.last, block=MAX_INT)))
        finish_epoch(world, station, liar, miner)
    settle(world, station)
    assert set(station.verdicts(miner).values()) <= {Verdict.PASSED, Verdict.NOT_DRAWN}
    assert list(station.verdicts(liar).values())[1] == Verdict.INVALID


def test_a_run_that_goes_back_is_followed_back(world, station):
    miner = Miner(world, "miner")
    for _ in range(3):
        epoch_of(world, miner, stations=[station])
    world.epoch = 1
    world._move(None)  # its peers were restarted from a checkpoint of epoch 2
    miner.begin()
    miner.offset = 100
    station.round()
    world.advance()
    epoch_of(world, miner, stations=[station])
    settle(world, station)
    query = "SELECT verdict FROM records WHERE swarm_epoch = 2 ORDER BY seen"
    found = [row[0] for row in station.state.database.rows(query)]
    assert len(found) == 2
    assert found[1] in (Verdict.PASSED, Verdict.NOT_DRAWN)


def test_honest_work_of_a_run_that_went_back_is_not_replayed_on_the_params_that_came_after(world):
    world.rules = replace(AUDITS, probability=1.0)
    station, miner = Station(world, "strict", replays=False), Miner(world, "miner")
    world.advance_to(TEMPO)
    miner.contribute()
    station.round()
    world.finish_epoch(miner)
    station.round()  # a round has it, and its beacon is still to come
    world.epoch = -1
    world._move(None)
    settle(world, station)
    assert station.verdicts(miner) == {0: Verdict.UNJUDGED}
    assert station.reasons(miner) == ["The params of swarm epoch 0 are others now: the run has gone back."]
    station.close()


# Audits


def test_no_reveal_forfeits_the_tempo_and_only_when_its_time_is_over(world, station):
    miner, silent = Miner(world, "miner"), Miner(world, "silent", reveals=False)
    silent.mine()
    record = publish_drawn(silent)
    miner.contribute()
    station.round()
    world.finish_epoch(miner, silent)
    due = record.block + AUDITS.beacon_lag + AUDITS.reveal_blocks
    while world.block < due:
        world.advance()
        station.round()
        assert Verdict.MISSING not in station.verdicts(silent).values()
    world.advance()
    station.round()
    assert Verdict.MISSING in station.verdicts(silent).values()
    while world.block <= END:
        epoch_of(world, miner, stations=[station])
    assert station.on_chain() == {miner.address: 1}


def test_a_reveal_that_comes_too_late_is_missing(world, station):
    miner = Miner(world, "miner", reveals=False)
    miner.mine()
    publish_drawn(miner)
    station.round()
    world.finish_epoch(miner)
    for _ in range(AUDITS.reveal_blocks + 1):
        station.round()
        world.advance()
    miner.reveal(*miner.withheld[-1])
    station.round()
    assert Verdict.MISSING in station.verdicts(miner).values()


@pytest.mark.parametrize("revealed", [True, False])
def test_a_validator_that_was_away_for_the_whole_reveal_accuses_nobody(world, station, revealed):
    miner = Miner(world, "miner", reveals=revealed)
    miner.mine()
    publish_drawn(miner)
    station.round()
    world.finish_epoch(miner)
    station.round()
    world.advance(AUDITS.reveal_blocks + 3)
    for _ in range(3):
        station.round()
        world.advance()
    verdicts = {verdict for _, verdict in station.verdicts(miner).items()}
    assert (Verdict.PASSED if revealed else Verdict.UNJUDGED) in verdicts
    assert Verdict.MISSING not in verdicts


def test_params_that_are_gone_leave_work_unjudged(world, station):
    miner = Miner(world, "miner")
    miner.mine()
    publish_drawn(miner)
    station.run.keep = 1
    station.round()
    world.finish_epoch(miner)
    for _ in range(4):
        world.advance()
        station.round()
    assert Verdict.UNJUDGED in station.verdicts(miner).values()


def test_data_that_cannot_be_read_are_tried_again_until_the_tempo_ends(world, station, monkeypatch):
    miner = Miner(world, "miner")
    broken = [True]
    replay = station.auditor._replayer.replay

    def sometimes(*args):
        if broken[0]:
            raise DataError("the hub is away")
        return replay(*args)

    monkeypatch.setattr(station.auditor._replayer, "replay", sometimes)
    miner.mine()
    publish_drawn(miner)
    station.round()
    world.finish_epoch(miner)
    settle(world, station, blocks=2)
    assert None in station.verdicts(miner).values()
    broken[0] = False
    station.round()
    assert Verdict.PASSED in station.verdicts(miner).values()
    broken[0] = True
    miner.mine()
    publish_drawn(miner)
    station.round()
    world.finish_epoch(miner)
    while not station.tempos() or world.block < END + TEMPO:
        world.advance()
        station.round()
    assert Verdict.UNJUDGED in station.verdicts(miner).values()
    assert station.on_chain() == {miner.address: 1}


def test_a_record_that_breaks_the_replay_holds_up_nobody_else(world, station, monkeypatch):
    victim, poison = Miner(world, "victim"), Miner(world, "poison")
    replay = station.auditor._replayer.replay

    def breaks(seed, slot, contribution, offset):
        if slot == poison.slot:
            raise RuntimeError("a kernel of the device failed")
        return replay(seed, slot, contribution, offset)

    monkeypatch.setattr(station.auditor._replayer, "replay", breaks)
    while world.block <= END:
        epoch_of(world, victim, poison, stations=[station])
    assert Verdict.PASSED in station.verdicts(victim).values()
    assert Verdict.UNJUDGED in station.verdicts(poison).values()
    assert station.on_chain()[victim.address] > 2 * station.on_chain().get(poison.address, 0)


# Sums


def test_a_round_whose_average_is_not_what_its_members_committed_to_is_flagged_and_names_nobody(world, station):
    honest, other = Miner(world, "honest"), Miner(world, "other")
    epoch_of(world, honest, other, stations=[station])
    for miner in (honest, other):
        miner.contribute()
    station.round()
    total = sum(4 * flat for flat in honest.sent) - 5 * sum(4 * flat for flat in other.sent)  # sent something else
    world.finish_epoch(honest, other, average=total / 16)
    settle(world, station)
    query = "SELECT epoch, sum_error <= sum_tolerance FROM rounds ORDER BY epoch"
    assert [tuple(row) for row in station.state.database.rows(query)] == [(0, 1), (1, 0)]
    verdicts = {*station.verdicts(honest).values(), *station.verdicts(other).values()}
    assert verdicts <= {Verdict.PASSED, Verdict.NOT_DRAWN}


def sums(station, epoch=0):
    return tuple(station.state.database.one("SELECT sum_error, unrecorded FROM rounds WHERE epoch = ?", epoch))


@pytest.mark.parametrize("stalled", [False, True])
def test_a_round_with_a_member_that_committed_to_nothing_is_counted_as_unchecked(world, station, stalled, caplog):
    caplog.set_level(logging.INFO)
    honest, unpaid = Miner(world, "honest"), Miner(world, "unpaid")
    honest.contribute()
    unpaid.mine()
    station.round()
    world.finish_epoch(honest, unpaid)
    settle(world, station)
    assert sums(station) == (None, None)  # the record may still be found
    assert station.verdicts(honest)[0] in (Verdict.PASSED, Verdict.NOT_DRAWN)
    if stalled:  # no later update: it is over when the tempo's records are let go of
        settle(world, station, blocks=TEMPO)
        assert station.tempos()
    for _ in range(0 if stalled else 3):
        epoch_of(world, honest, stations=[station])
    assert sums(station) == (None, 1)
    (said,) = [record.args for record in caplog.records if "nobody can say" in record.message]
    assert said == (0, 1, 2)


def test_a_round_is_compared_when_its_last_record_is_found(world, station):
    honest, slow = Miner(world, "honest"), Miner(world, "slow")
    honest.contribute()
    key = work_key(RUN, slow.contribute().swarm_epoch)
    held_back = world.dht[key].pop(hotkey_subkey(slow.address))
    station.round()
    world.finish_epoch(honest, slow)
    settle(world, station, blocks=1)
    assert sums(station) == (None, None)
    world.dht[key][hotkey_subkey(slow.address)] = held_back
    station.round()
    error, unrecorded = sums(station)
    assert error < 1e-4
    assert unrecorded is None


def test_a_sum_of_an_average_that_is_infinite_is_flagged(world, station):
    miner = Miner(world, "miner")
    miner.contribute()
    station.round()
    flat = miner.sent[0].clone()
    flat[0] = torch.inf
    world.finish_epoch(miner, average=flat)
    station.round()
    assert station.state.database.one("SELECT sum_error > sum_tolerance FROM rounds")[0] == 1
