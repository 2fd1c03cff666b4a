"""Tempos: when one is scored, what its scores and weights were, and what became of the weights.

Surprising fact: a tempo of scores ends some blocks before the chain's own, so that the weights arrive in time. Where it
ends is a function of block numbers alone, and so the same for all validators.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from hivetrain.chain.base import Snapshot
from hivetrain.contribution.audit import Verdict
from hivetrain.errors import UserError
from hivetrain.scoring import Judged, TempoScore
from hivetrain.validator.schema import Database


class Status(StrEnum):
    """What became of a tempo's weights."""

    PENDING = "pending"
    SENDING = "sending"  # on the way, or the answer was lost: the chain is read before they are sent again
    SET = "set"
    SEALED = "sealed"  # the chain reveals them later
    EMPTY = "empty"  # nobody has earned anything, and the chain has no weights of ours that pay anybody
    FAILED = "failed"
    REPLACED = "replaced"  # by those of a later tempo


UNFINISHED = (Status.PENDING, Status.SENDING)


@dataclass(frozen=True)
class Tempo:
    """A tempo that was scored.

    Attributes:
        block: its last block.
        weights: share by hotkey; empty if nobody has earned anything.
        status: what became of them.
        attempts: how often they were sent.
        sent_block: when they were sent last.
        sent_after: the chain's block of our weights before that.
        retry_block: they are not sent before this one.
        receipt: what is known about it, for people.
    """

    block: int
    weights: dict[str, float]
    status: Status
    attempts: int
    sent_block: int | None
    sent_after: int | None
    retry_block: int
    receipt: str


class Tempos:
    """The tempos in a state file; writes belong inside a transaction.

    Args:
        database: closed or open.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def last_end(self) -> int | None:
        """Last block of the last tempo that was scored, or the block in which this validator began."""
        row = self._database.one(
            "SELECT max(block) FROM (SELECT block FROM tempos UNION ALL "
            "SELECT CAST(value AS INTEGER) FROM facts WHERE name = 'began')"
        )
        return None if row is None else row[0]

    def judged_until(self, block: int) -> list[Judged]:
        """Everything with a verdict that was due until a block and has not counted yet."""
        query = (
            "SELECT hotkey, swarm_epoch, samples, verdict FROM records "
            "WHERE tempo IS NULL AND verdict IS NOT NULL AND due <= ?"
        )
        return [
            Judged(hotkey, epoch, n, Verdict(verdict))
            for hotkey, epoch, n, verdict in self._database.rows(query, block)
        ]

    def averages(self) -> dict[str, float]:
        """The moving averages after the last tempo."""
        row = self._database.one("SELECT averages FROM tempos ORDER BY block DESC LIMIT 1")
        return {} if row is None else json.loads(row[0])

    def add(
        self,
        block: int,
        scored_at: int,
        scores: Mapping[str, TempoScore],
        averages: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> None:
        """Closes a tempo: its records have counted, and its weights wait to be sent instead of earlier ones."""
        self._database.write(
            f"UPDATE tempos SET status = ? WHERE status IN ({', '.join('?' * len(UNFINISHED))})",
            Status.REPLACED, *UNFINISHED,
        )  # fmt: skip
        described = {hotkey: asdict(score) for hotkey, score in scores.items()}
        self._database.write(
            "INSERT INTO tempos (block, scored_at, scores, averages, weights, status) VALUES (?, ?, ?, ?, ?, ?)",
            block, scored_at, json.dumps(described), json.dumps(averages), json.dumps(weights), Status.PENDING,
        )  # fmt: skip
        self._database.write(
            "UPDATE records SET tempo = ? WHERE tempo IS NULL AND verdict IS NOT NULL AND due <= ?", block, block
        )
        # The evidence against somebody stays.
        self._database.write(
            "UPDATE records SET sealed = NULL, reveal = NULL WHERE tempo = ? AND verdict NOT IN (?, ?)",
            block, Verdict.FAILED, Verdict.MISSING,
        )  # fmt: skip

    def latest(self) -> Tempo | None:
        row = self._database.one("SELECT * FROM tempos ORDER BY block DESC LIMIT 1")
        if row is None:
            return None
        return Tempo(
            row["block"], json.loads(row["weights"]), Status(row["status"]), row["attempts"], row["sent_block"],
            row["sent_after"], row["retry_block"], row["receipt"],
        )  # fmt: skip

    def sent_before(self, block: int) -> dict[str, float]:
        """The weights that were sent last for a tempo before a block, whether they arrived or not."""
        query = "SELECT weights FROM tempos WHERE attempts > 0 AND block < ? ORDER BY block DESC LIMIT 1"
        row = self._database.one(query, block)
        return {} if row is None else json.loads(row[0])

    def begin_sending(self, tempo: Tempo, block: int, last_update: int) -> None:
        """Written before the chain is called, so that a program that dies in between knows that it may have been."""
        self._database.write(
            "UPDATE tempos SET status = ?, sent_block = ?, sent_after = ?, attempts = attempts + 1 WHERE block = ?",
            Status.SENDING, block, last_update, tempo.block,
        )  # fmt: skip

    def settle(self, tempo: Tempo, status: Status, receipt: str, retry_block: int = 0) -> None:
        """What became of the weights, or when to try again."""
        self._database.write(
            "UPDATE tempos SET status = ?, receipt = ?, retry_block = ? WHERE block = ?",
            status, receipt, retry_block, tempo.block,
        )  # fmt: skip

    def prune(self, before_block: int) -> None:
        """Forgets the older ones."""
        self._database.write("DELETE FROM tempos WHERE block < ?", before_block)


def margin_of(view: Snapshot, submit_margin: int | None) -> int:
    """Blocks from the end of a tempo of scores to the chain's epoch.

    Raises:
        UserError: it is not less than the chain's tempo.
    """
    margin = max(2, view.tempo // 20) if submit_margin is None else submit_margin
    if not 0 <= margin < view.tempo:
        raise UserError(f"scoring.submit_margin must be less than the chain's tempo, {view.tempo} blocks, got {margin}")
    return margin


def ends_between(after: int, view: Snapshot, margin: int) -> list[int]:
    """Ends of tempos of scores behind one block and up to the current one, in order."""
    end = view.next_epoch - margin
    found = []
    while end > after:
        if end <= view.block:
            found.append(end)
        end -= view.tempo
    return found[::-1]


def last_end(view: Snapshot, margin: int) -> int:
    """The last end of a tempo of scores that lies behind us."""
    end = view.next_epoch - margin
    return end if end <= view.block else end - view.tempo
