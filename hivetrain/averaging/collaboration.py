"""One model in one run: its place in the swarm, and the decision between microbatch, global update and catching up.

It knows nothing of Lightning: the caller computes gradients and passes a ``step`` that applies whatever gradient the
params hold. A failed round leaves params, optimizer and accumulated gradient as they were.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from hivetrain.averaging.accumulator import GradientAccumulator
from hivetrain.averaging.attempt import Attempt
from hivetrain.averaging.compression import make_compressor
from hivetrain.averaging.held import HeldState
from hivetrain.averaging.pace import Pace
from hivetrain.averaging.peer import SwarmPeer
from hivetrain.averaging.progress import SwarmView
from hivetrain.averaging.report import Member, Outcome, RoundReport
from hivetrain.averaging.state import StateError
from hivetrain.averaging.watch import Watchers

logger = logging.getLogger(__name__)

POLICIES = ("retry", "skip", "local")
_RETRY_SYNC_S = 2.0
_POLICY_LOCAL = "the policy after a failed round"


class Collaboration:
    """Accumulates gradients, averages them with the swarm, and keeps the params in step with it.

    Args:
        module: the model; all trainable params on one device.
        optimizer: the only optimizer.
        target_batch_size: samples per global update, over all peers.
        policy: what to do after a failed round: ``retry``, ``skip`` or ``local``.
        matchmaking_time_s: how long a round waits for peers that have not come yet.
        averaging_timeout_s: longest time that one call of :meth:`advance` tries to average.
        overlap: average one batch's gradient while the next batch is gathered on the params before that update.
        compression: name of the compressor; see ``compression.make_compressor``.
        on_epoch: called with the new epoch after each change of it.
        on_report: called with each report.
        watchers: who follows this peer's work.
        keep_updates_bytes: bytes of past averaged gradients to keep for those who follow the run.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        target_batch_size: int,
        policy: str,
        matchmaking_time_s: float,
        averaging_timeout_s: float,
        overlap: bool,
        compression: str,
        on_epoch: Callable[[int], None],
        on_report: Callable[[RoundReport], None],
        watchers: Watchers,
        keep_updates_bytes: int,
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._target, self._policy = target_batch_size, policy
        self._matchmaking_time_s, self._averaging_timeout_s = matchmaking_time_s, averaging_timeout_s
        self._overlap = overlap
        self._pending: Attempt | None = None
        self._on_epoch, self._on_report, self._watchers = on_epoch, on_report, watchers
        self.held = HeldState(module, optimizer, keep_updates_bytes)
        self.accumulator = GradientAccumulator(p for group in optimizer.param_groups for p in group["params"])
        self.compressor = make_compressor(compression, self.accumulator.shapes)
        self.rounds: list[RoundReport] = []
        self.samples_contributed = 0
        self.samples_dropped = 0
        self._peer: SwarmPeer | None = None
        self._pace = Pace(target_batch_size)
        self._next_sync = 0.0
        self._ahead_since: float | None = None

    @property
    def epoch(self) -> int:
        """Finished global updates."""
        return self.held.epoch

    @property
    def peer(self) -> SwarmPeer:
        assert self._peer is not None, "begin() comes first"
        return self._peer

    def begin(self, peer: SwarmPeer) -> None:
        """Takes part from now on: fetches the swarm's state if it is not the own, then shows up among the peers."""
        self._peer = peer
        self.held.open()
        self._pace.start()
        peer.refresh()
        if not self._in_step():
            logger.warning("could not get the swarm's state yet; trying again after each microbatch")
        else:
            self._announce()

    def end(self) -> None:
        """Serves no state any more."""
        self._peer = None
        self.held.close()

    def add(self, samples: int) -> None:
        """Adds the params' gradients, a mean over ``samples`` samples, to this epoch's sum."""
        self._watchers.on_microbatch(samples)
        self.accumulator.add(samples)
        self._pace.add(samples)

    def advance(self, step: Callable[[], Any]) -> None:
        """Makes a global update if the swarm's batch is full, or catches up if the swarm has gone on.

        Raises:
            Interrupted: the program is asked to end; params and gradient are untouched.
        """
        epoch = self.epoch
        in_round = self._pending is not None and self._pending.grouped.is_set()
        if not in_round and not self._in_step():
            self._drop()
        if self._pending is not None and self._pending.is_due:
            self._finish_overlapped(self._pending, step)
        if epoch == self.epoch and self.accumulator.samples and self._pending is None:
            self._announce()
            if self.peer.view().is_full(self.epoch, self._target):
                if self._overlap:
                    self._start_overlapped(step)
                else:
                    self._update(step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "swarm_epoch": self.epoch,
            "samples_contributed": self.samples_contributed,
            "samples_dropped": self.samples_dropped,
            "accumulator": self.accumulator.state_dict(),
            "compressor": self.compressor.state_dict(),
            "pending": None if self._pending is None else (self._pending.gradient, self._pending.blank.local_samples),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held.epoch = int(state["swarm_epoch"])
        self.samples_contributed = int(state["samples_contributed"])
        self.samples_dropped = int(state["samples_dropped"])
        self.accumulator.load_state_dict(state["accumulator"])
        self.compressor.load_state_dict(state["compressor"])
        if state["pending"] is not None:
            self.accumulator.add_back(*state["pending"])

    def _in_step(self) -> bool:
        """Takes over the swarm's state if this peer's is not it. Returns whether the peer is in step now."""
        if not self._is_out_of_step(self.peer.view()) or not self._is_out_of_step(view := self.peer.refresh()):
            return True
        if time.monotonic() < self._next_sync:
            return False
        why = f"at swarm epoch {self.epoch}, the swarm is at {view.epoch}"
        if view.epoch == self.epoch:
            why = f"its params differ from those of most peers at swarm epoch {self.epoch}"
        try:
            snapshot = self.peer.download(self._module, self._optimizer)
        except (StateError, TimeoutError) as error:
            logger.warning("this peer is out of step (%s) and could not get the swarm's state: %s", why, error)
            self.peer.retract()  # others must not wait for a peer that cannot follow
            self._next_sync = time.monotonic() + _RETRY_SYNC_S
            return False
        self.held.take_over(snapshot)
        self._on_epoch(self.epoch)
        self.compressor.reset()
        dropped = self.accumulator.samples
        self._drop()
        logger.warning("resynchronised (%s): now at swarm epoch %d, %d samples dropped", why, self.epoch, dropped)
        self._announce()
        return True

    def _is_out_of_step(self, view: SwarmView) -> bool:
        if view.epoch >= self.epoch:
            self._ahead_since = None
        if view.epoch > self.epoch:
            return True
        if view.epoch < self.epoch:
            # Whoever commits first is ahead for a moment. Who stays ahead went its own way: most peers decide.
            self._ahead_since = self._ahead_since or time.monotonic()
            return time.monotonic() - self._ahead_since > 2 * self._matchmaking_time_s
        return bool(view.digest) and view.digest != bytes.fromhex(self.held.digest)[: len(view.digest)]

    def _update(self, step: Callable[[], Any]) -> None:
        deadline = time.monotonic() + self._averaging_timeout_s
        self._announce(waiting=True)
        gradient, samples = self.accumulator.mean(), self.accumulator.samples
        while True:
            report, average = self._attempt(gradient, samples, deadline - time.monotonic())
            self._record(report)
            if average is not None:
                return self._apply(average, report, step)
            held = self.epoch, self.held.digest
            if not self._in_step() or (self.epoch, self.held.digest) != held:
                return None  # the gradient was that of other params, and is dropped
            in_time = time.monotonic() + self._matchmaking_time_s < deadline
            if self._policy == "retry" and in_time and self.peer.view().is_full(self.epoch, self._target):
                continue
            if self._policy == "skip":
                self._drop()
                self._announce()
            elif self._policy == "local":
                local = RoundReport(
                    self.epoch, Outcome.LOCAL, samples=samples, local_samples=samples, reason=_POLICY_LOCAL
                )
                self._record(local)
                self._apply(gradient, local, step)
            else:
                self._announce()
            return None

    def _attempt(
        self, gradient: torch.Tensor, samples: int, timeout_s: float
    ) -> tuple[RoundReport, torch.Tensor | None]:
        view = self.peer.refresh()
        commitment = self._watchers.on_commit(self.epoch, self.held.digest, samples)
        if len(view.peers) == 1:
            return self._alone(samples, commitment), gradient
        if all(peer.client_mode for peer in view.peers):
            logger.warning("all peers are in client mode: none can be dialled, so no group can form")
        attempt = self.peer.start_average(
            self.compressor, gradient, samples, commitment, view, max(timeout_s, self._matchmaking_time_s)
        )
        return self.peer.finish_average(attempt, lambda: self._is_out_of_step(self.peer.view()))

    def _alone(self, samples: int, commitment: bytes) -> RoundReport:
        return RoundReport(
            self.epoch,
            Outcome.ALONE,
            fraction=1.0,
            samples=samples,
            local_samples=samples,
            reason="no other live peer",
            members=(Member(self.peer.peer_id, samples, float(samples), commitment),),
        )

    def _start_overlapped(self, step: Callable[[], Any]) -> None:
        gradient, samples, view = self.accumulator.mean(), self.accumulator.samples, self.peer.view()
        self.accumulator.reset()
        commitment = self._watchers.on_commit(self.epoch, self.held.digest, samples)
        if len(view.peers) == 1:
            report = self._alone(samples, commitment)
            self._record(report)
            return self._apply(gradient, report, step)
        self.peer.announce(self.epoch, samples, self._pace.samples_per_s, self.held.digest, waiting=True)
        self._pending = self.peer.start_average(
            self.compressor, gradient, samples, commitment, view, self._averaging_timeout_s
        )
        return None

    def _finish_overlapped(self, attempt: Attempt, step: Callable[[], Any]) -> None:
        self._pending = None
        report, average = self.peer.finish_average(attempt, lambda: False)
        self._record(report)
        samples = attempt.blank.local_samples
        if average is not None:
            return self._apply(average, report, step)
        if self._policy == "local":
            local = RoundReport(self.epoch, Outcome.LOCAL, samples=samples, local_samples=samples, reason=_POLICY_LOCAL)
            self._record(local)
            return self._apply(attempt.gradient, local, step)
        if self._policy == "skip":
            self.samples_dropped += samples
        else:
            self.accumulator.add_back(attempt.gradient, samples)
        return self._announce()

    def _apply(self, gradient: torch.Tensor, report: RoundReport, step: Callable[[], Any]) -> None:
        if report.outcome is Outcome.AVERAGED:
            self.compressor.commit()
        with self.held.step(report, gradient):
            self.accumulator.put(gradient)
            step()
            self._optimizer.zero_grad()
            if not self._overlap:  # else what is there belongs to the next update already
                self.accumulator.reset()
            self.samples_contributed += report.local_samples
        self._on_epoch(self.epoch)
        self._watchers.on_update(report)
        self._announce()

    def _drop(self) -> None:
        if self._pending is not None:
            self._pending.future.cancel()
            self.samples_dropped += self._pending.blank.local_samples
            self._pending = None
        self.samples_dropped += self.accumulator.samples
        self.accumulator.reset()
        self._watchers.on_dropped()

    def _announce(self, waiting: bool = False) -> None:
        self.peer.announce(self.epoch, self.accumulator.samples, self._pace.samples_per_s, self.held.digest, waiting)

    def _record(self, report: RoundReport) -> None:
        self.rounds.append(report)
        logger.log(logging.INFO if report.committed else logging.WARNING, "%s", report)
        self._on_report(report)
        self._pace.end_attempt(report, waited=not self._overlap)
