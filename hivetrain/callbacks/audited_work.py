"""One miner's provable work: a leaf for each microbatch, a signed record before each exchange, a reveal when drawn.

Surprising fact: what goes wrong here costs pay, never training. Whatever keeps a record from being made or published
leaves the round without a commitment, and the gradient goes on to the swarm all the same.
"""

import logging
import time
from functools import partial
from typing import Any

import torch

from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.averaging.watch import RoundWatcher
from hivetrain.callbacks.beacon_clock import BeaconClock
from hivetrain.callbacks.work_counts import WorkCounts
from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import (
    Contribution,
    Position,
    RecordError,
    Reveal,
    commitment,
    hotkey_subkey,
    reveal_key,
    seal,
    work_key,
)
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import Sketcher, sketch_seed
from hivetrain.keys import Hotkey

logger = logging.getLogger(__name__)

_PAID = (Outcome.AVERAGED, Outcome.ALONE)


class AuditedWork(RoundWatcher):
    """Follows a strategy's microbatches and rounds, and commits to them.

    Args:
        strategy: a ``HivemindStrategy``.
        data: the data module that it trains on.
        hotkey: signs.
        rules: of the run's audits.
        precision: in which gradients are computed, in Lightning's words.
        clock: knows the chain's block and who is drawn.
        counts: where records are counted.
        publish_timeout_s: longest wait for the DHT, once for each record.
        lifetime_s: seconds that records stay in the DHT.
    """

    def __init__(
        self,
        strategy: Any,
        data: Any,
        hotkey: Hotkey,
        rules: AuditRules,
        precision: str,
        clock: BeaconClock,
        counts: WorkCounts,
        publish_timeout_s: float,
        lifetime_s: float,
    ) -> None:
        self.strategy, self.data = strategy, data
        self.hotkey, self.rules, self.precision = hotkey, rules, precision
        self.clock, self.counts = clock, counts
        self.log = WorkLog()
        self.loss: torch.Tensor | None = None  # of the microbatch under way
        self._publish_timeout_s, self._lifetime_s = publish_timeout_s, lifetime_s
        self._sketcher: Sketcher | None = None
        self._sketches = self._at = (-1, "")  # epoch and digest of the params: of the sketcher, and of the log
        self._published: tuple[Contribution, bytes] | None = None  # of the round under way, with its commitment
        self._commitment = b""

    def on_microbatch(self, samples: int) -> None:
        """Adds its leaf. One that cannot be part of the record is not lost on the swarm, but the epoch is unpaid."""
        self._at = (self.strategy.swarm_epoch, self.strategy.held_digest)
        try:
            self.add_leaves(samples, self.sketch())
        except RecordError as error:
            logger.warning("a microbatch is left out of the record, so this swarm epoch goes unpaid: %s", error)

    def on_commit(self, swarm_epoch: int, params_digest: str, samples: int) -> bytes:
        """Publishes the record of all leaves so far and returns its commitment; b"" if that cannot be done."""
        self._commitment = b""
        try:
            self._commitment = self._commit(swarm_epoch, params_digest, samples)
        except (RecordError, TimeoutError) as error:
            self.counts.commits_unpaid += 1
            logger.warning("swarm epoch %d goes unpaid: %s", swarm_epoch, error)
        return self._commitment

    def on_update(self, report: RoundReport) -> None:
        """Begins the next record."""
        if self._commitment and report.outcome in _PAID:
            self.counts.samples_committed += report.local_samples
        self._begin()

    def on_dropped(self) -> None:
        """Throws the open record away; one that was published is still revealed if it is drawn."""
        self.counts.contributions_dropped += self.log.microbatches > 0
        self._begin()

    def sketch(self) -> torch.Tensor:
        """Sketch of the gradients as they are, (256,) fp32."""
        params = self.strategy.trainable_params
        if self._sketcher is None or self._sketches != self._at:
            seed = sketch_seed(self.strategy.run_id, *self._at)
            self._sketcher = Sketcher(seed, [param.numel() for param in params], params[0].device)
            self._sketches = self._at
        return self._sketcher.sketch([param.grad for param in params])

    def add_leaves(self, samples: int, sketch: torch.Tensor) -> None:
        """Adds the microbatch that the data module handed out last.

        Raises:
            RecordError: it cannot be part of the record.
        """
        assert self.loss is not None, "the loss comes before the gradient"
        consumed = self.data.cursor.consumed - samples
        self.log.add(self.position(0), consumed, samples, float(self.loss), sketch)

    def position(self, index: int) -> Position:
        """Where block ``index`` of that microbatch stands."""
        at = self.data.consumed_addresses[index]
        units = self.data.assignment.at_pass(at.data_pass).units(at.window, self.data.slot)
        return Position(at.data_pass, at.window, units.index(at.unit), at.k)

    def contribution(self, swarm_epoch: int, params_digest: str, block: int) -> Contribution:
        """The record of all leaves so far."""
        return self.log.contribution(
            run_id=self.strategy.run_id,
            hotkey=self.hotkey.address,
            peer_id=self.strategy.peer_id,
            swarm_epoch=swarm_epoch,
            params_digest=params_digest,
            rules=self.rules,
            block=block,
            precision=self.precision,
        )

    def reveal(self, contribution: Contribution, bound: bytes, log: WorkLog, drawn: tuple[int, ...]) -> bool:
        """Publishes the drawn leaves; returns whether the DHT took them. Called on the clock's thread."""
        epoch = contribution.swarm_epoch
        found = log.reveal(bound, drawn, run_id=contribution.run_id, hotkey=contribution.hotkey, swarm_epoch=epoch)
        return self.publish(reveal_key(contribution.run_id, epoch), found) is not None

    def publish(self, key: str, record: Contribution | Reveal) -> bytes | None:
        """Seals a record and stores it; returns the sealed bytes, None if the DHT did not take them in time."""
        expires = time.time() + self._lifetime_s  # DHT time is the time since 1970
        sealed = seal(record, self.hotkey, expires)
        subkey = hotkey_subkey(self.hotkey.address)
        taken = self.strategy.publish(key, subkey, sealed, expires, self._publish_timeout_s)
        return sealed if taken else None

    def _commit(self, swarm_epoch: int, params_digest: str, samples: int) -> bytes:
        if samples != self.log.samples or (swarm_epoch, params_digest) != self._at:
            raise RecordError(f"{samples} samples are offered, {self.log.samples} were recorded for these params")
        block = self.clock.block
        if block is None:
            self.counts.commits_late += 1
            raise TimeoutError("the chain's block is not known, so the record would come too late")
        if self._published is not None:
            earlier, bound = self._published
            if (earlier.samples, earlier.block) == (samples, block):
                return bound
        made = self.contribution(swarm_epoch, params_digest, block)
        sealed = self.publish(work_key(made.run_id, swarm_epoch), made)
        if sealed is None:
            self.counts.publish_failures += 1
            raise TimeoutError("the DHT did not take the record in time")
        self.counts.contributions_published += 1
        self._published = made, commitment(sealed)
        self.clock.expect(made, partial(self.reveal, *self._published, self.log.copy()))
        return self._published[1]

    def _begin(self) -> None:
        self.log.reset()
        self._published, self._commitment = None, b""
