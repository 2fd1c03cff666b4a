"""What a validator knows, in its own words: contributions, rounds, polls. Tempos are in tempos.py.

Surprising fact: a record is kept under its commitment, so whatever is read twice is there once, and one that its miner
has replaced in the DHT since is not forgotten.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hivetrain.averaging.updates import Followed
from hivetrain.contribution.audit import Audit, Verdict
from hivetrain.contribution.record import Contribution, open_contribution
from hivetrain.validator.sales import Sales
from hivetrain.validator.schema import Database

MOST_RECORDS = 256  # of one hotkey in one epoch; a miner renews its record every few blocks while rounds fail


@dataclass(frozen=True)
class OpenRecord:
    """A contribution without a verdict.

    Attributes:
        commitment: its SHA-256.
        sealed: as it was published.
        slot: the hotkey's uid when it was seen.
        beacon: block whose hash draws.
        due: last block for its reveal.
        seen: block in which it was first seen.
        exchanged: whether a committed round has it.
        drawn: leaves; None while the beacon is not known.
        reveal: sealed, if one was seen in time.
        looked_in: whether a poll found no reveal while there was time left.
        looked_after: whether a poll found none when the time was over.
    """

    commitment: bytes
    sealed: bytes
    slot: int
    beacon: int
    due: int
    seen: int
    exchanged: bool
    drawn: tuple[int, ...] | None
    reveal: bytes | None
    looked_in: bool
    looked_after: bool

    @cached_property
    def contribution(self) -> Contribution:
        return open_contribution(self.sealed)


@dataclass(frozen=True)
class Seen:
    """A record as it was admitted, or why it was not."""

    commitment: bytes
    hotkey: str
    swarm_epoch: int
    slot: int
    peer_id: str
    samples: int
    beacon: int
    due: int
    seen: int
    sealed: bytes | None
    verdict: Verdict | None = None
    reason: str = ""
    note: str = ""


@dataclass(frozen=True)
class Round:
    """How a swarm epoch ended.

    Attributes:
        epoch: its number.
        digest: of the params that its gradients are of.
        members: (peer_id, samples, weight, commitment) of each member; None if it could not be followed.
    """

    epoch: int
    digest: str
    members: tuple[tuple[str, int, float, bytes], ...] | None

    def weight_of(self, peer_id: str) -> float:
        """What a member's samples counted for in the average; 0 for somebody else."""
        return next((weight for peer, _, weight, _ in self.members or () if peer == peer_id), 0.0)


class State:
    """Reads and writes a validator's state; writes belong inside ``transaction()``.

    Args:
        database: closed or open.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.transaction = database.transaction
        self.sales = Sales(database)

    def open(self, **facts: str) -> None:
        """Takes the file; ``facts`` are what it must have been begun with.

        Raises:
            UserError: the file belongs to another run or validator, or cannot be used.
        """
        self.database.open(**facts)

    def close(self) -> None:
        self.database.close()

    def set_fact(self, name: str, value: str) -> None:
        self.database.write("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, value)

    # Polls

    def last_poll(self) -> int | None:
        """The chain's block before the latest poll."""
        row = self.database.one("SELECT began FROM polls ORDER BY id DESC LIMIT 1")
        return None if row is None else int(row[0])

    def last_epoch_read(self) -> int | None:
        """The last swarm epoch that the latest poll looked for."""
        row = self.database.one("SELECT last_epoch FROM polls ORDER BY id DESC LIMIT 1")
        return None if row is None else int(row[0])

    def add_poll(self, began: int, ended: int, first_epoch: int, last_epoch: int, current: bool) -> None:
        """Keeps that the records of some epochs were read.

        Args:
            began: the chain's block before reading.
            ended: the one after it.
            first_epoch: first epoch read.
            last_epoch: last epoch read.
            current: whether the run itself was no further, so that nothing can have lain under later ones.
        """
        self.database.write(
            "INSERT INTO polls (began, ended, first_epoch, last_epoch, current) VALUES (?, ?, ?, ?, ?)",
            began, ended, first_epoch, last_epoch, current,
        )  # fmt: skip

    def was_present(self, epoch: int, from_block: int) -> bool:
        """Whether a poll that began at this block or later would have seen a record of ``epoch``."""
        query = "SELECT 1 FROM polls WHERE began >= ? AND first_epoch <= ? AND (last_epoch >= ? OR current) LIMIT 1"
        return self.database.one(query, from_block, epoch, epoch) is not None

    def polled_between(self, after: int, until: int) -> bool:
        """Whether any poll began after one block and ended no later than another."""
        return self.database.one("SELECT 1 FROM polls WHERE began > ? AND ended <= ? LIMIT 1", after, until) is not None

    # Rounds

    def add_round(self, followed: Followed, sketch: bytes | None) -> None:
        """Keeps how an epoch ended; the first report of an epoch stands."""
        members = None
        if followed.update is not None:
            members = json.dumps(
                [[m.peer_id, m.samples, m.weight, m.commitment.hex()] for m in followed.update.members]
            )
        self.database.write(
            "INSERT OR IGNORE INTO rounds (epoch, digest, members, sketch) VALUES (?, ?, ?, ?)",
            followed.epoch, followed.params_digest, members, sketch,
        )  # fmt: skip

    def forget_rounds_from(self, epoch: int) -> int:
        """The run has gone back: these epochs are not over after all. Returns how many there were."""
        self.sales.forget_from(epoch)
        return self.database.write("DELETE FROM rounds WHERE epoch >= ?", epoch)

    def round(self, epoch: int) -> Round | None:
        row = self.database.one("SELECT epoch, digest, members FROM rounds WHERE epoch = ?", epoch)
        return None if row is None else _round(row)

    def commits(self, ended: Round) -> list[tuple[int, int]]:
        """Of each member whose record was seen: the block that it names, and the one in which it was seen."""
        query = "SELECT sealed, seen FROM records WHERE commitment = ? AND sealed IS NOT NULL"
        rows = [self.database.one(query, bound) for _, _, _, bound in ended.members or ()]
        return [(open_contribution(row["sealed"]).block, row["seen"]) for row in rows if row is not None]

    # Records

    def knows(self, commitment: bytes) -> bool:
        return self.database.one("SELECT 1 FROM records WHERE commitment = ?", commitment) is not None

    def is_full(self, hotkey: str, epoch: int) -> bool:
        """Whether no more records of this hotkey and epoch are taken."""
        query = "SELECT count(*) FROM records WHERE hotkey = ? AND swarm_epoch = ?"
        row = self.database.one(query, hotkey, epoch)
        return row is not None and row[0] >= MOST_RECORDS

    def add(self, seen: Seen) -> None:
        values = asdict(seen)
        columns = ", ".join(values)
        marks = ", ".join("?" * len(values))
        self.database.write(f"INSERT OR IGNORE INTO records ({columns}) VALUES ({marks})", *values.values())

    def open_records(self, condition: str = "TRUE", *values: Any) -> list[OpenRecord]:
        """Records without a verdict, in order of epoch and hotkey."""
        query = (
            f"SELECT * FROM records WHERE verdict IS NULL AND ({condition}) ORDER BY swarm_epoch, hotkey, commitment"
        )
        return [
            OpenRecord(
                row["commitment"], row["sealed"], row["slot"], row["beacon"], row["due"], row["seen"],
                bool(row["exchanged"]),
                None if row["drawn"] is None else tuple(json.loads(row["drawn"])), row["reveal"],
                bool(row["looked_in"]), bool(row["looked_after"]),
            )
            for row in self.database.rows(query, *values)
        ]  # fmt: skip

    def count_open(self) -> int:
        """Records without a verdict."""
        row = self.database.one("SELECT count(*) FROM records WHERE verdict IS NULL")
        return 0 if row is None else int(row[0])

    def last_objections(self, tempo: int) -> dict[str, str]:
        """By hotkey, why its last unpaid contribution of a tempo was not paid."""
        query = "SELECT hotkey, reason FROM records WHERE tempo = ? AND verdict NOT IN (?, ?) ORDER BY swarm_epoch"
        return dict(tuple(row) for row in self.database.rows(query, tempo, Verdict.PASSED, Verdict.NOT_DRAWN))

    def set_drawn(self, commitment: bytes, drawn: Sequence[int], beacon_hash: str) -> None:
        self.database.write(
            "UPDATE records SET drawn = ?, beacon_hash = ? WHERE commitment = ?",
            json.dumps(list(drawn)), beacon_hash, commitment,
        )  # fmt: skip

    def set_reveal(self, commitment: bytes, sealed: bytes, note: str) -> None:
        self.database.write(
            "UPDATE records SET reveal = ?, note = note || ? WHERE commitment = ?", sealed, note, commitment
        )

    def looked_for_reveal(self, commitment: bytes, *, after: bool) -> None:
        column = "looked_after" if after else "looked_in"
        self.database.write(f"UPDATE records SET {column} = 1 WHERE commitment = ?", commitment)

    def set_exchanged(self, record: OpenRecord, weight: float) -> None:
        """A committed round has this record, and its data count as used. No more is paid than moved the average."""
        work = record.contribution
        self.database.write(
            "UPDATE records SET exchanged = 1, samples = min(samples, ?) WHERE commitment = ?",
            int(weight), record.commitment,
        )  # fmt: skip
        self.sales.add(work)

    def judge(self, commitment: bytes, found: Audit) -> None:
        """The verdict, with its evidence; there is only one."""
        self.database.write(
            "UPDATE records SET verdict = ?, reason = ?, leaves = ? WHERE commitment = ? AND verdict IS NULL",
            str(found.verdict), found.reason, json.dumps([asdict(leaf) for leaf in found.leaves]), commitment,
        )  # fmt: skip

    def prune(self, before_block: int) -> None:
        """Forgets what is older than a block; of a hotkey's positions the last one stays."""
        self.database.write("DELETE FROM polls WHERE ended < ?", before_block)
        self.database.write("DELETE FROM records WHERE tempo IS NOT NULL AND due < ?", before_block)
        oldest = self.database.one(
            "SELECT coalesce((SELECT min(swarm_epoch) FROM records), (SELECT max(epoch) FROM rounds), 0)"
        )
        assert oldest is not None
        self.database.write("DELETE FROM rounds WHERE epoch < ?", oldest[0])
        self.sales.prune(oldest[0])


def _round(row: Any) -> Round:
    members = row["members"]
    if members is None:
        return Round(row["epoch"], row["digest"], None)
    parsed = tuple((peer_id, samples, weight, bytes.fromhex(c)) for peer_id, samples, weight, c in json.loads(members))
    return Round(row["epoch"], row["digest"], parsed)
