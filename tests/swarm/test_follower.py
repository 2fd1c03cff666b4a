"""Following a run from outside: every update, bit by bit, and what happens when that cannot be."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import worker
from peers import assert_one_state, committed, wait_until

from hivetrain.averaging.observer import SwarmObserver
from hivetrain.averaging.progress import Progress, SwarmView
from hivetrain.averaging.report import Member
from hivetrain.averaging.settings import RunSettings
from hivetrain.averaging.state import StateError, params_digest, schema_of, take_snapshot
from hivetrain.averaging.updates import Followed, Update, UpdateLog
from hivetrain.errors import UserError
from hivetrain.strategies.clipping import clip_by_norm
from hivetrain.strategies.epoch_files import EpochFiles
from hivetrain.strategies.follower import Follower, Optimization
from hivetrain.swarm import start_dht

CLIP = 0.5
KEEPING = {"options": {"keep_updates_mb": 1}, "trainer": {"gradient_clip_val": CLIP}}


class Outsider:
    """An observer of a run with a follower on it."""

    def __init__(self, swarm, directory, seed=5, keep=100):
        torch.manual_seed(seed)
        self.module = worker.Regression(worker.DEFAULTS["width"], worker.DEFAULTS["lr"], 0)
        numel = sum(param.numel() for param in self.module.parameters())
        settings = RunSettings(schema_of(self.module), numel, worker.DEFAULTS["target"], "none", "AdamW")
        self.dht = start_dht(swarm.common["initial_peers"].split(","), client_mode=True)
        self.observer = SwarmObserver(self.dht, swarm.common["run_id"], settings, timeout_s=10)
        self.observer.open()
        optimization = Optimization.of(self.module, CLIP, None)
        self.follower = Follower(self.module, optimization, self.observer, EpochFiles(directory, keep))
        self.follower.recall()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.observer.close()
        self.dht.shutdown()


def follow_until(follower, epoch, followed, timeout_s=60):
    def reached():
        followed.extend(follower.advance())
        return follower.epoch >= epoch

    wait_until(reached, timeout_s, f"the follower reaches epoch {epoch}")


def test_a_follower_makes_every_update_and_nobody_notices_it(swarm, tmp_path):
    peers = swarm.start_together(2, **KEEPING)
    swarm.wait_for_epoch(1)
    followed = []
    with Outsider(swarm, tmp_path / "epochs") as outsider:
        follow_until(outsider.follower, 3, followed)
        seen = outsider.follower.epoch
        follow_until(outsider.follower, seen + 5, followed)
        assert outsider.follower.resynchronised == 0
        last, digest = outsider.follower.epoch, outsider.follower.digest
        kept_digest, kept = outsider.follower.params(last)
        assert kept_digest == digest
    with Outsider(swarm, tmp_path / "epochs", seed=6) as resumed:
        assert (resumed.follower.epoch, resumed.follower.digest) == (last, digest)
        again = []
        follow_until(resumed.follower, last + 2, again)
        assert resumed.follower.resynchronised == 0
        assert [f.epoch for f in again] == list(range(followed[0].epoch, resumed.follower.epoch))
        assert [replace(f.update, average=None) for f in again[: len(followed)]] == [
            replace(f.update, average=None) for f in followed
        ]
        assert all(f.update.average is not None for f in again[len(followed) :])
    results = swarm.finish(*peers)
    assert_one_state(*results)
    rounds = {report["swarm_epoch"]: report for report in committed(results[0])}
    for entry in followed:
        report = rounds[entry.epoch]
        assert report["expected_peers"] == report["group_size"] == 2  # a follower is nobody's peer
        assert {m.peer_id for m in entry.update.members} == {m["peer_id"] for m in report["members"]}
        assert sum(member.samples for member in entry.update.members) == report["samples"]
    assert sorted(kept) == sorted(name for name, _ in outsider.module.named_parameters())


def test_without_updates_the_state_is_taken_over_and_the_epochs_count_as_not_followed(swarm, tmp_path):
    peers = swarm.start_together(2, trainer={"gradient_clip_val": CLIP})
    swarm.wait_for_epoch(1)
    followed = []
    with Outsider(swarm, tmp_path / "epochs") as outsider:
        follow_until(outsider.follower, 1, [])
        follow_until(outsider.follower, outsider.follower.epoch + 3, followed)
        assert outsider.follower.resynchronised >= 1
        assert params_digest(outsider.module) == outsider.follower.digest
    assert followed
    assert all(entry.update is None for entry in followed)
    swarm.finish(*peers)


class ScriptedRun:
    """Peers at some epoch, whose updates are as given; ``false`` ones are told first."""

    def __init__(self, updates, digest, false=()):
        self.updates, self.false, self.digest = updates, list(false), digest

    def view(self):
        peer = Progress("peer", b"run", len(self.updates), digest=bytes.fromhex(self.digest)[:16])
        return SwarmView.of([peer], b"run", 100)

    def fetch_update(self, epoch, view):
        if self.false:
            return self.false.pop(0)
        return self.updates[epoch]

    def download(self, view, module, optimizer):
        raise StateError("nobody gives it")


def trained(updates):
    """A module that has made some updates, and those updates."""
    torch.manual_seed(0)
    module = worker.Regression(8, 0.01, 0)
    optimizer = module.configure_optimizers()
    snapshot = take_snapshot(module, optimizer, 0, params_digest(module))
    numel, made = sum(p.numel() for p in module.parameters()), []
    for epoch in range(updates):
        average = torch.randn(numel)
        made.append(Update(epoch, (Member("peer", 4, 4.0),), average))
        parts = average.clone().split([p.numel() for p in module.parameters()])
        for param, part in zip(module.parameters(), parts, strict=True):
            param.grad = part.view_as(param)
        clip_by_norm(module.parameters(), CLIP)
        optimizer.step()
    return snapshot, made, params_digest(module)


def follower_of(run, snapshot, directory, keep=10):
    module = worker.Regression(8, 0.01, 0)
    files = EpochFiles(directory, keep)
    files.stage(snapshot, None)
    files.settle()
    follower = Follower(module, Optimization.of(module, CLIP, None), run, files)
    follower.recall()
    return follower


def test_a_false_update_is_undone_and_asked_for_again(tmp_path):
    snapshot, updates, digest = trained(3)
    false = [replace(updates[0], average=-updates[0].average)]
    follower = follower_of(ScriptedRun(updates, digest, false), snapshot, tmp_path)
    followed = follower.advance()
    assert [entry.epoch for entry in followed] == [0, 1, 2]
    assert all(entry.update is updates[entry.epoch] for entry in followed)
    assert (follower.epoch, follower.digest) == (3, digest)


def test_updates_that_never_lead_to_the_peers_params_are_not_reported(tmp_path):
    snapshot, updates, _ = trained(3)
    follower = follower_of(ScriptedRun(updates, "ab" * 32), snapshot, tmp_path)
    assert follower.advance() == []
    assert (follower.epoch, follower.digest) == (0, snapshot.digest)
    assert follower.params(1) is None
    assert not list(tmp_path.glob("*.staged"))


def test_a_machine_with_another_arithmetic_follows_by_taking_over_the_state(tmp_path):
    snapshot, updates, digest = trained(1)
    other = replace(updates[0], average=updates[0].average * 1.001)  # stands for another rounding

    class Run(ScriptedRun):
        def header(self, epoch, view):
            return replace(updates[epoch], average=None)

        def download(self, view, module, optimizer):
            follower = follower_of(ScriptedRun(updates, digest), snapshot, tmp_path / "donor")
            follower.advance()
            return follower._files.latest()

    follower = follower_of(Run([other], digest), snapshot, tmp_path / "own")
    followed = follower.advance()
    assert followed == [Followed(0, snapshot.digest, replace(updates[0], average=None))]
    assert (follower.epoch, follower.digest, follower.resynchronised) == (1, digest, 1)
    resumed = Follower(follower._module, follower._optimization, follower._observer, follower._files)
    resumed.recall()
    assert resumed.advance() == followed


def test_a_follower_goes_back_with_its_run_and_forgets_what_came_after(tmp_path):
    old, _, _ = trained(0)
    now = [1.0]

    class Run(ScriptedRun):
        def view(self):
            return SwarmView.of([Progress("peer", b"run", 50, digest=bytes.fromhex(old.digest)[:16])], b"run", 100)

        def download(self, view, module, optimizer):
            return replace(old, epoch=50)

    for epoch in range(102, 106):
        follower = follower_of(Run([], old.digest), replace(old, epoch=epoch), tmp_path, keep=4)
    follower._clock = lambda: now[0]
    follower.advance()
    assert follower.epoch == 105  # it may be a peer that is behind
    now[0] = 100.0
    follower.advance()
    assert (follower.epoch, follower.digest) == (50, old.digest)
    assert follower.params(50)[0] == old.digest
    assert [follower.params(epoch) for epoch in range(102, 106)] == [None] * 4
    resumed = Follower(follower._module, follower._optimization, follower._observer, follower._files)
    resumed.recall()
    assert resumed.epoch == 50


def test_params_of_another_model_are_refused(tmp_path):
    snapshot, _, _ = trained(1)
    damaged = replace(snapshot, tensors={k: v + 1 if v.is_floating_point() else v for k, v in snapshot.tensors.items()})
    with pytest.raises(UserError, match="another model"):
        follower_of(ScriptedRun([], "00" * 32), damaged, tmp_path)


def test_a_model_with_two_optimizers_cannot_be_followed():
    two = SimpleNamespace(configure_optimizers=lambda: ([1], [2]))
    with pytest.raises(UserError, match="one optimizer"):
        Optimization.of(two, None, None)


def test_the_log_of_updates_stays_within_its_bytes():
    log, members = UpdateLog(limit_bytes=100), (Member("peer", 4, 4.0),)
    for epoch in range(5):
        log.add(epoch, members, torch.full((10,), float(epoch)))
    assert log.get(2) is None
    assert log.get(3).average.tolist() == [3.0] * 10
    log.add(9, members, torch.zeros(26))  # larger than all there is room for
    log.add(9, (), torch.zeros(1))  # of nobody
    assert log.get(9) is None
    assert UpdateLog(0).add(0, members, torch.zeros(1)) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x92\x00\x90" * 2**17, b"\x92\xff\x90", b"\x92\x00\x91\x94\xa1p\x00\xcb" + bytes(8) + b"\xc4\x00",
     b"\x92\x00\x91\x94\xa1p\x01\xcb\x7f\xf8" + bytes(6) + b"\xc4\x00", b"\x91" * 5000],
)  # fmt: skip
def test_a_malformed_header_of_an_update_is_refused(data):
    started = time.monotonic()
    with pytest.raises(StateError):
        Update.parse_header(data)
    assert time.monotonic() - started < 1


def test_a_header_survives_the_way():
    update = Update(7, (Member("a", 4, 2.0, bytes(32)), Member("b", 9, 9.0)))
    assert Update.parse_header(update.header()) == update
