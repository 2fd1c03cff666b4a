"""From records to verdicts: which round has them, what the beacon draws, what a replay finds.

Surprising fact: a verdict is given once and never taken back, and each is written down by itself. So it does not matter
how many are given in one round.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from hivetrain.chain.base import Chain
from hivetrain.contribution.audit import Audit, Verdict
from hivetrain.contribution.beacon import draw
from hivetrain.contribution.rules import AuditRules
from hivetrain.data.errors import DataError
from hivetrain.validator.auditor import Auditor
from hivetrain.validator.intake import last_commit, match, without_reveal
from hivetrain.validator.run import FollowedRun
from hivetrain.validator.state import OpenRecord, State
from hivetrain.validator.watch import ValidatorWatcher

logger = logging.getLogger(__name__)

_ACCUSED = (Verdict.FAILED, Verdict.MISSING)


class Judge:
    """Gives verdicts on the records in the state.

    Args:
        chain: has the beacons.
        run: has the params.
        state: open.
        rules: of the run's audits.
        auditor: replays.
        timeout_s: limit for one call to the chain.
        clock: monotonic seconds.
        watcher: told of replays and verdicts.
    """

    def __init__(
        self,
        chain: Chain,
        run: FollowedRun,
        state: State,
        rules: AuditRules,
        auditor: Auditor,
        timeout_s: float,
        clock: Callable[[], float],
        watcher: ValidatorWatcher,
    ) -> None:
        self._watcher = watcher
        self._chain, self._run, self._state, self._rules = chain, run, state, rules
        self._auditor, self._timeout_s, self._clock = auditor, timeout_s, clock

    def match(self) -> None:
        """Looks for each record among the members of the round that ended its epoch."""
        last: dict[int, int | None] = {}
        for record in self._state.open_records("NOT exchanged"):
            work = record.contribution
            ended = self._state.round(work.swarm_epoch)
            if ended is None:
                continue
            if ended.epoch not in last:
                last[ended.epoch] = last_commit(self._state.commits(ended))
            with self._state.transaction():
                objection = match(record, ended, last[ended.epoch], self._rules)
                objection = objection or self._state.sales.objection(work)
                if objection is None:
                    self._state.set_exchanged(record, ended.weight_of(work.peer_id))
                else:
                    self.decide(record, objection)

    def draw(self, block: int) -> None:
        """Draws the leaves of all records whose beacon exists."""
        hashes: dict[int, str | None] = {}
        for record in self._state.open_records("drawn IS NULL AND beacon <= ?", block):
            if record.beacon not in hashes:
                hashes[record.beacon] = self._chain.block_hash(record.beacon, self._timeout_s)
            beacon, work = hashes[record.beacon], record.contribution
            with self._state.transaction():
                if beacon is not None:
                    drawn = draw(beacon, work.run_id, work.swarm_epoch, work.hotkey, work.microbatches, self._rules)
                    self._state.set_drawn(record.commitment, drawn, beacon)
                elif block > record.due:
                    reason = f"The hash of its beacon, block {record.beacon}, is no longer known."
                    self.decide(record, Audit(Verdict.UNJUDGED, reason))

    def judge(self, for_s: float, final: int | None) -> bool:
        """Gives verdicts for some seconds; returns whether more could be given.

        Args:
            for_s: seconds; the replay that is under way then is finished.
            final: what was due until this block is audited now or not at all.
        """
        until = self._clock() + for_s
        for record in self._state.open_records("exchanged AND drawn IS NOT NULL"):
            if record.drawn and record.reveal is None:
                found = without_reveal(record)
            elif self._clock() > until:
                return True
            else:
                found = self._audit(record, final is not None and record.due <= final)
            if found is not None:
                with self._state.transaction():
                    self.decide(record, found)
        return False

    def decide(self, record: OpenRecord, found: Audit) -> None:
        """Writes a verdict down; inside a transaction."""
        work = record.contribution
        self._state.judge(record.commitment, found)
        self._watcher.judged(str(found.verdict), work.samples)
        level = logging.WARNING if found.verdict in _ACCUSED else logging.INFO if found.leaves else logging.DEBUG
        logger.log(level, "swarm epoch %d, %s: %s: %s", work.swarm_epoch, work.hotkey, found.verdict, found.reason)

    def _audit(self, record: OpenRecord, final: bool) -> Audit | None:
        """The verdict, or None to try again later."""
        work = record.contribution
        none: tuple[str, Mapping[str, torch.Tensor]] = ("", {})
        digest, params = (self._run.params(work.swarm_epoch) or none) if record.drawn else (work.params_digest, {})
        if digest != work.params_digest:
            why = "others now: the run has gone back" if digest else "not kept: raise run.keep_epochs"
            reason = f"The params of swarm epoch {work.swarm_epoch} are {why}."
            logger.warning("%s: unjudged: %s", work.hotkey, reason)
            return Audit(Verdict.UNJUDGED, reason)
        began = self._clock()
        try:
            found = self._auditor.audit(record, params)
            if found.leaves:
                self._watcher.audited(self._clock() - began)
            if found.verdict is Verdict.PASSED:
                resold = self._state.sales.resale(work, partial(self._auditor.carry, record.slot))
                return found if resold is None else replace(resold, leaves=found.leaves)
            return found
        except Exception as error:  # one record may not hold up the pay of all others
            known = isinstance(error, (DataError, torch.OutOfMemoryError))
            logger.warning(
                "cannot audit %s in swarm epoch %d: %s", work.hotkey, work.swarm_epoch, error, exc_info=not known
            )
            return Audit(Verdict.UNJUDGED, f"This validator could not replay it: {error}") if final else None
