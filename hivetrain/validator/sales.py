"""Which data a hotkey has been credited with, so that none are paid twice.

Surprising fact: an end is kept as if the unit in which the last microbatch begins went on, for how many blocks a unit
holds is known only to who reads it. The first look at a contribution reads nothing, and finds all that lies within one
unit; an audit has the units at hand, and carries such ends over into the units where they lie.
"""

import json
from collections.abc import Callable

from hivetrain.contribution.audit import Audit, Verdict
from hivetrain.contribution.fields import MAX_INT
from hivetrain.contribution.record import Contribution, Position
from hivetrain.data.errors import AssignmentError
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
        self._database.write(
            "INSERT INTO positions VALUES (?, ?, ?, ?)",
            work.hotkey, work.swarm_epoch, _packed(work.first), _packed(_end(work)),
        )  # fmt: skip

    def objection(self, work: Contribution) -> Audit | None:
        """Why a contribution cannot be credited, as far as can be said without its data."""
        if self._position("SELECT first FROM positions WHERE hotkey = ? AND swarm_epoch = ?", work) is not None:
            return Audit(Verdict.INVALID, "Another contribution of this hotkey counts for the same swarm epoch.")
        later = "SELECT first FROM positions WHERE hotkey = ? AND swarm_epoch > ? ORDER BY swarm_epoch LIMIT 1"
        end, behind = _end(work), self._position(later, work)
        if behind is not None and end >= behind:
            reason = f"It ends at {_text(end)}, and was paid from {_text(behind)} on later."
            return Audit(Verdict.INVALID, reason)
        return self.resale(work)

    def resale(
        self, work: Contribution, carry: Callable[[Position], Position] = lambda position: position
    ) -> Audit | None:
        """Whether a contribution begins with what its hotkey was credited with in earlier epochs.

        Args:
            work: the contribution.
            carry: finds where a block lies whose number goes on past the end of its unit.

        Raises:
            DataError: the data cannot be read now.
        """
        earlier = "SELECT last FROM positions WHERE hotkey = ? AND swarm_epoch < ? ORDER BY swarm_epoch DESC LIMIT 1"
        before = self._position(earlier, work)
        if before is None:
            return None
        try:
            before = carry(before)
        except AssignmentError as error:
            return Audit(Verdict.INVALID, f"It was paid before for data that do not exist: {error}")
        if work.first > before:
            return None
        return Audit(Verdict.INVALID, f"It begins at {_text(work.first)}, and was paid up to {_text(before)} before.")

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

    def _position(self, query: str, work: Contribution) -> Position | None:
        row = self._database.one(query, work.hotkey, work.swarm_epoch)
        return None if row is None else Position(*json.loads(row[0]))


def _end(work: Contribution) -> Position:
    """The last block, numbered on from the unit in which the last microbatch begins."""
    last = work.last
    return Position(last.data_pass, last.window, last.place, min(last.block + work.batch_size - 1, MAX_INT))


def _packed(position: Position) -> str:
    return json.dumps([position.data_pass, position.window, position.place, position.block])


def _text(position: Position) -> str:
    return f"{position.data_pass}/{position.window}/{position.place}/{position.block}"
