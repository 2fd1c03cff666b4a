"""Which data a hotkey has been credited with, so that none are paid twice."""

import json

from hivetrain.contribution.audit import Audit, Verdict
from hivetrain.contribution.fields import MAX_INT
from hivetrain.contribution.record import Contribution, Position
from hivetrain.validator.schema import Database


class Sales:
    """What hotkeys have been credited with, in a state file; writes belong inside a transaction.

    Args:
        database: closed or open.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, work: Contribution) -> None:
        """Credits a contribution; there is one of a hotkey in an epoch."""
        # The end of the last microbatch, as far as it lies in the same unit.
        last = (*_place(work.last)[:3], min(work.last.block + work.batch_size - 1, MAX_INT))
        self._database.write(
            "INSERT INTO positions VALUES (?, ?, ?, ?)",
            work.hotkey, work.swarm_epoch, json.dumps(_place(work.first)), json.dumps(last),
        )  # fmt: skip

    def objection(self, work: Contribution) -> Audit | None:
        """Why a contribution cannot be credited."""
        before, within, behind = self._around(work.hotkey, work.swarm_epoch)
        if within is not None:
            return Audit(Verdict.INVALID, "Another contribution of this hotkey counts for the same swarm epoch.")
        if before is not None and work.first <= before:
            reason = f"It begins at {_text(work.first)}, and was paid up to {_text(before)} before."
            return Audit(Verdict.INVALID, reason)
        if behind is not None and work.last >= behind:
            reason = f"It ends at {_text(work.last)}, and was paid from {_text(behind)} on later."
            return Audit(Verdict.INVALID, reason)
        return None

    def forget_from(self, epoch: int) -> None:
        """The run has gone back: what was credited in these epochs may be used again."""
        self._database.write("DELETE FROM positions WHERE swarm_epoch >= ?", epoch)

    def prune(self, before_epoch: int) -> None:
        """Forgets what is older than an epoch, but of each hotkey the last."""
        self._database.write(
            "DELETE FROM positions WHERE swarm_epoch < ? AND EXISTS (SELECT 1 FROM positions AS later "
            "WHERE later.hotkey = positions.hotkey AND later.swarm_epoch > positions.swarm_epoch)",
            before_epoch,
        )

    def _around(self, hotkey: str, epoch: int) -> tuple[Position | None, Position | None, Position | None]:
        """The end before ``epoch``, the begin in it, the begin after it."""
        queries = (
            "SELECT last FROM positions WHERE hotkey = ? AND swarm_epoch < ? ORDER BY swarm_epoch DESC LIMIT 1",
            "SELECT first FROM positions WHERE hotkey = ? AND swarm_epoch = ?",
            "SELECT first FROM positions WHERE hotkey = ? AND swarm_epoch > ? ORDER BY swarm_epoch LIMIT 1",
        )
        rows = [self._database.one(query, hotkey, epoch) for query in queries]
        before, within, behind = (None if row is None else Position(*json.loads(row[0])) for row in rows)
        return before, within, behind


def _place(position: Position) -> tuple[int, int, int, int]:
    return position.data_pass, position.window, position.place, position.block


def _text(position: Position) -> str:
    return f"{position.data_pass}/{position.window}/{position.place}/{position.block}"
