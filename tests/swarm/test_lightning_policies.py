"""What becomes of a gradient whose round failed, under each policy; the network is a script of outcomes."""

from types import SimpleNamespace

import pytest
import torch
from solo import adamw, distance, net, reference, samples

from hivetrain.averaging.collaboration import Collaboration
from hivetrain.averaging.group import DIGEST_BYTES
from hivetrain.averaging.progress import Progress, SwarmView
from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.averaging.state import params_digest, take_snapshot
from hivetrain.averaging.watch import Watchers

NO_CAP = 2**53


class ScriptedPeer:
    """Sees two other peers, always at its own epoch, and lets rounds end as told; an average is the gradient itself.

    After the first round the others hold the state ``theirs``, if there is one, and wait.
    """

    def __init__(self, *outcomes):
        self.outcomes, self.brought, self.theirs = list(outcomes), [], None
        self.own = Progress("own", b"same")

    def view(self):
        digest, differ = self.own.digest, self.theirs is not None and bool(self.brought)
        if differ:
            digest = bytes.fromhex(self.theirs.digest)[:DIGEST_BYTES]
        others = [Progress(name, b"same", self.own.epoch, digest=digest, waiting=differ) for name in ("one", "other")]
        return SwarmView.of([self.own, *others], b"same", NO_CAP)

    def download(self, module, optimizer):
        return self.theirs

    refresh = view

    def announce(self, epoch, samples, samples_per_s, digest, waiting):
        digest = bytes.fromhex(digest)[:DIGEST_BYTES]
        self.own = Progress("own", b"same", epoch, samples, samples_per_s, digest, waiting=waiting)

    def start_average(self, compressor, gradient, samples, commitment, view, timeout_s):
        self.brought.append(samples)
        blank = RoundReport(self.own.epoch, Outcome.UNKNOWN, 1, 2, local_samples=samples)
        return SimpleNamespace(gradient=gradient, blank=blank)

    def finish_average(self, attempt, obsolete):
        outcome, count = self.outcomes.pop(0), attempt.blank.local_samples
        report = RoundReport(self.own.epoch, outcome, 2, 2, local_samples=count, reason="as told")
        return report, attempt.gradient if outcome is Outcome.AVERAGED else None


class Training:
    """A net, AdamW and a collaboration with a scripted peer; batches of four samples."""

    def __init__(self, policy, *outcomes, timeout_s=60.0):
        self.net, self.peer, self.x_y, self.at = net(), ScriptedPeer(*outcomes), samples(64), 0
        self.optimizer = adamw(self.net.parameters())
        self.collaboration = Collaboration(
            self.net, self.optimizer, target_batch_size=8, policy=policy, matchmaking_time_s=1.0,
            averaging_timeout_s=timeout_s, compression="none", overlap=False,
            on_epoch=lambda epoch: None, on_report=lambda report: None, watchers=Watchers(), keep_updates_bytes=0,
        )  # fmt: skip
        self.collaboration.begin(self.peer)

    def train(self, microbatches):
        for _ in range(microbatches):
            x, y = (part[self.at : self.at + 4] for part in self.x_y)
            self.at += 4
            self.optimizer.zero_grad()
            torch.nn.functional.mse_loss(self.net(x), y).backward()
            self.collaboration.add(4)
            self.collaboration.advance(self.optimizer.step)
        return self.collaboration

    def expected(self, *ranges):
        model, _, _ = reference([tuple(part[slice(*range_)] for part in self.x_y) for range_ in ranges])
        return model


@pytest.mark.parametrize("failure", [o for o in Outcome if o not in (Outcome.AVERAGED, Outcome.ALONE, Outcome.LOCAL)])
def test_retry_keeps_the_gradient_and_tries_again_at_once(failure):
    training = Training("retry", failure, failure, Outcome.AVERAGED)
    collaboration = training.train(2)
    assert [report.outcome for report in collaboration.rounds] == [failure, failure, "averaged"]
    assert [report.committed for report in collaboration.rounds] == [False, False, True]
    assert training.peer.brought == [8, 8, 8]
    assert distance(training.net, training.expected((0, 8))) < 1e-6
    assert (collaboration.epoch, collaboration.samples_contributed, collaboration.samples_dropped) == (1, 8, 0)


def test_retry_lets_later_microbatches_join_when_time_is_up():
    training = Training("retry", Outcome.INCOMPLETE, Outcome.NO_GROUP, Outcome.AVERAGED, timeout_s=0.5)
    collaboration = training.train(2)
    assert distance(training.net, net()) == 0
    assert collaboration.accumulator.samples == 8
    collaboration = training.train(2)
    assert training.peer.brought == [8, 12, 16]
    assert distance(training.net, training.expected((0, 16))) < 1e-6
    assert (collaboration.epoch, collaboration.samples_contributed, collaboration.samples_dropped) == (1, 16, 0)


def test_a_gradient_of_params_that_were_replaced_is_not_tried_again():
    training = Training("retry", Outcome.INCOMPLETE, Outcome.AVERAGED)
    other = net(seed=1)
    training.peer.theirs = take_snapshot(other, adamw(other.parameters()), 0, params_digest(other))
    collaboration = training.train(2)
    assert training.peer.brought == [8]
    assert distance(training.net, other) == 0
    assert (collaboration.epoch, collaboration.samples_contributed, collaboration.samples_dropped) == (0, 0, 8)


def test_skip_gives_the_gradient_up_and_counts_it():
    training = Training("skip", Outcome.INCOMPLETE, Outcome.AVERAGED)
    collaboration = training.train(2)
    assert distance(training.net, net()) == 0
    collaboration = training.train(2)
    assert distance(training.net, training.expected((8, 16))) < 1e-6
    assert (collaboration.epoch, collaboration.samples_contributed, collaboration.samples_dropped) == (1, 8, 8)


def test_local_steps_with_the_own_gradient_and_says_so():
    training = Training("local", Outcome.INCOMPLETE, Outcome.AVERAGED)
    collaboration = training.train(4)
    assert [report.outcome for report in collaboration.rounds] == ["incomplete", "local", "averaged"]
    assert distance(training.net, training.expected((0, 8), (8, 16))) < 1e-6
    assert (collaboration.epoch, collaboration.samples_contributed, collaboration.samples_dropped) == (2, 16, 0)
