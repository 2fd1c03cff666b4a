"""Whether what was exchanged is what was committed to: a round's average beside the totals of its members.

Surprising fact: one member without a readable record keeps a round from being compared at all, and that member needs no
uid. So a round that was not compared is told, counted and shown like one that differs.
"""

import logging

from hivetrain.contribution.record import open_contribution
from hivetrain.validator.auditor import Auditor
from hivetrain.validator.state import Round, State
from hivetrain.validator.watch import ValidatorWatcher

logger = logging.getLogger(__name__)


class Sums:
    """Compares the rounds in the state.

    Args:
        state: open.
        auditor: knows how well sums agree.
        watcher: told of rounds.
    """

    def __init__(self, state: State, auditor: Auditor, watcher: ValidatorWatcher) -> None:
        self._state, self._auditor, self._watcher = state, auditor, watcher

    def check(self) -> None:
        """Compares all rounds that can be compared by now, and gives up those that never can; names nobody."""
        tolerance = self._auditor.sum_tolerance
        query = "SELECT epoch, sketch FROM rounds WHERE sketch IS NOT NULL AND sum_error IS NULL AND unrecorded IS NULL"
        if tolerance is None:
            return
        for epoch, sketch in self._state.database.rows(query):
            ended = self._state.round(epoch)
            assert ended is not None
            self._check(ended, sketch, tolerance)

    def _check(self, ended: Round, sketch: bytes, tolerance: float) -> None:
        query = "SELECT sealed FROM records WHERE commitment = ? AND peer_id != ''"
        found = [(weight, self._state.database.one(query, bound)) for _, _, weight, bound in ended.members or ()]
        seen = [(weight, row["sealed"]) for weight, row in found if row is not None]
        kept = [(weight, sealed) for weight, sealed in seen if sealed is not None]
        if found and len(kept) == len(found):
            error = self._auditor.sum_error(sketch, [(weight, open_contribution(sealed)) for weight, sealed in kept])
            self._write("sum_error = ?, sum_tolerance = ?", ended.epoch, error, tolerance)
            self._watcher.compared("agrees" if error <= tolerance else "differs")
            if not error <= tolerance:
                logger.warning(
                    "swarm epoch %d: the average differs by %.2g from what its %d members committed to (at most %g)",
                    ended.epoch, error, len(found), tolerance,
                )  # fmt: skip
        elif len(kept) < len(seen) or not self._is_read(ended.epoch):  # no later poll can change that
            unrecorded = len(found) - len(seen)
            self._write("unrecorded = ?", ended.epoch, unrecorded)
            self._watcher.compared("unchecked")
            logger.info(
                "swarm epoch %d: nobody can say whether the average is what its members committed to: %d of %d have no "
                "readable record", ended.epoch, unrecorded, len(found),
            )  # fmt: skip

    def _is_read(self, epoch: int) -> bool:
        """Whether polls still look for records of an epoch."""
        row = self._state.database.one("SELECT first_epoch FROM polls ORDER BY id DESC LIMIT 1")
        return row is None or row["first_epoch"] <= epoch

    def _write(self, values: str, epoch: int, *numbers: float) -> None:
        with self._state.transaction():
            self._state.database.write(f"UPDATE rounds SET {values} WHERE epoch = ?", *numbers, epoch)
