"""The miner's log: what it commits to and what it can show later."""

import dataclasses
import math

import pytest
import torch

from hivetrain.contribution import merkle
from hivetrain.contribution.beacon import draw
from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import MAX_MICROBATCHES, Position, RecordError, commitment, seal
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import sketch_vector

OF = {"run_id": "run-1", "swarm_epoch": 7}


def test_a_contribution_says_what_was_added(make_log, make_contribution, hotkey):
    record = make_contribution(make_log(5, batch_size=8), hotkey, swarm_epoch=9)
    assert (record.microbatches, record.batch_size, record.samples, record.span) == (5, 8, 40, 40)
    assert (record.first, record.last) == (Position(0, 2, 1, 3), Position(0, 2, 1, 35))
    assert record.rules == AuditRules().fingerprint
    assert record.hotkey == hotkey.address
    assert record.swarm_epoch == 9


def test_the_total_is_the_sum_of_the_leaves_times_the_batch_size(make_log, make_contribution, hotkey):
    log = make_log(40, batch_size=3)
    total = torch.zeros(256)
    for leaf in log.leaves:
        total += 3 * leaf.vector
    assert torch.equal(sketch_vector(make_contribution(log, hotkey).total), total)
    assert torch.equal(log.total, total)


def test_losses_are_kept_as_fp32():
    log = WorkLog()
    log.add(Position(0, 0, 0, 0), 0, 8, 0.1, torch.ones(256))
    assert log.leaves[0].loss == float(torch.tensor(0.1))


@pytest.mark.parametrize("microbatches", [1, 2, 5, 33])
def test_drawn_leaves_are_shown_under_the_committed_root(make_log, make_contribution, hotkey, microbatches):
    log, rules = make_log(microbatches), AuditRules(probability=1.0)
    record = make_contribution(log, hotkey)
    committed = commitment(seal(record, hotkey, 1e9))
    drawn = draw("0x" + "ab" * 32, "run-1", 7, hotkey.address, microbatches, rules)
    reveal = log.reveal(committed, drawn, hotkey=hotkey.address, **OF)
    assert reveal.commitment == committed
    assert tuple(shown.index for shown in reveal.leaves) == drawn
    for shown in reveal.leaves:
        assert shown.leaf == log.leaves[shown.index]
        assert merkle.verify(record.root, microbatches, shown.index, shown.leaf.hash, shown.path)
        other = dataclasses.replace(shown.leaf, loss=9.0)
        assert not merkle.verify(record.root, microbatches, shown.index, other.hash, shown.path)


def test_left_out_microbatches_leave_gaps(make_contribution, hotkey):
    log = WorkLog()
    for block, consumed in ((0, 50), (4, 54), (12, 62)):  # the one at block 8 was not finite
        log.add(Position(0, 0, 0, block), consumed, 4, 2.0, torch.ones(256))
    assert [leaf.offset for leaf in log.leaves] == [0, 4, 12]
    record = make_contribution(log, hotkey)
    assert (record.samples, record.span) == (12, 16)


def test_too_many_gaps_cannot_be_contributed(make_contribution, hotkey):
    log = WorkLog()
    log.add(Position(0, 0, 0, 0), 0, 4, 2.0, torch.ones(256))
    log.add(Position(0, 0, 0, 16), 16, 4, 2.0, torch.ones(256))
    with pytest.raises(RecordError, match="left out"):
        make_contribution(log, hotkey)


def test_another_batch_size_is_refused_with_the_reason(make_log):
    log = make_log(2)
    with pytest.raises(RecordError, match="single batch size"):
        log.add(Position(0, 3, 0, 0), 2000, 5, 2.0, torch.ones(256))
    assert log.microbatches == 2


@pytest.mark.parametrize(
    ("position", "consumed"),
    [(Position(0, 2, 1, 11), 1016), (Position(0, 2, 1, 19), 1008), (Position(0, 2, 1, 19), 1015)],
)
def test_a_block_cannot_be_added_twice(make_log, position, consumed):
    log = make_log(2)
    with pytest.raises(RecordError, match="behind the one before"):
        log.add(position, consumed, 8, 2.0, torch.ones(256))
    log.add(Position(0, 2, 1, 19), 1016, 8, 2.0, torch.ones(256))


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e39])
def test_a_loss_that_is_no_number_is_refused_and_changes_nothing(make_log, make_contribution, hotkey, loss):
    log = make_log(2)
    with pytest.raises(RecordError, match="loss"):
        log.add(Position(0, 2, 1, 19), 1016, 8, loss, torch.ones(256))
    with pytest.raises(RecordError, match="sketch"):
        log.add(Position(0, 2, 1, 19), 1016, 8, 2.0, torch.full((256,), math.nan))
    assert make_contribution(log, hotkey) == make_contribution(make_log(2), hotkey)


def test_a_refused_first_microbatch_leaves_an_empty_log():
    log = WorkLog()
    with pytest.raises(RecordError, match="loss"):
        log.add(Position(0, 0, 0, 0), 0, 8, math.nan, torch.ones(256))
    log.add(Position(0, 0, 0, 5), 5, 4, 2.0, torch.ones(256))
    assert (log.samples, log.span, log.leaves[0].offset) == (4, 4, 0)


def test_a_full_log_is_refused(monkeypatch, make_log):
    assert MAX_MICROBATCHES == 65536
    monkeypatch.setattr("hivetrain.contribution.leaves.MAX_MICROBATCHES", 3)
    with pytest.raises(RecordError, match="at most 3 microbatches"):
        make_log(4)


def test_an_empty_log_contributes_nothing(make_contribution, hotkey):
    log = WorkLog()
    assert (log.microbatches, log.samples, log.span) == (0, 0, 0)
    with pytest.raises(RecordError, match="no work"):
        make_contribution(log, hotkey)
    with pytest.raises(ValueError, match="none of 0"):
        log.reveal(bytes(32), (0,), hotkey=hotkey.address, **OF)


def test_a_copy_is_kept_while_the_log_goes_on(make_log, make_contribution, hotkey):
    log = make_log(3)
    record, kept = make_contribution(log, hotkey), log.copy()
    log.add(Position(0, 2, 1, 27), 1024, 8, 2.0, torch.ones(256))
    log.reset()
    log.add(Position(0, 5, 0, 0), 9000, 4, 1.0, torch.ones(256))
    assert make_contribution(kept, hotkey) == record
    assert kept.reveal(bytes(32), (2,), hotkey=hotkey.address, **OF).leaves[0].index == 2


def test_a_reset_log_begins_anew(make_log):
    log = make_log(3)
    log.reset()
    log.add(Position(0, 0, 0, 0), 5, 2, 1.0, torch.ones(256))
    assert log.leaves[0].offset == 0
    assert torch.equal(log.total, torch.full((256,), 2.0))
