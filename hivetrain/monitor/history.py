"""What is kept of a run: one line for each swarm epoch, peers over time, events. One SQLite file for each run.

Surprising fact: what single peers said is kept for the last epochs only. An epoch's line is made anew while its peers
still tell of it, and stays as it is afterwards, so the file grows by some hundred bytes an epoch however many peers
there are.
"""

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from hivetrain.monitor.aggregate import EpochLine, epoch_line
from hivetrain.monitor.roster import Event, Member, Presence
from hivetrain.monitor.status import EpochNote, RoundNote
from hivetrain.sqlite_file import Kind, SqliteFile

KEPT_NOTES = 64  # epochs for which single peers' words are kept
MAX_EVENTS = 10_000
_LINE = tuple(field.name for field in fields(EpochLine))
_ROUND = tuple(field.name for field in fields(RoundNote))
_VALUES = {"notes": ("loss", "samples"), "rounds": _ROUND[2:], "heldout": ("loss",)}  # what is no key
_SCHEMA = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE epochs (epoch INTEGER PRIMARY KEY, {", ".join(_LINE[1:])});
CREATE TABLE notes (epoch INTEGER, peer TEXT, loss REAL, samples INTEGER, PRIMARY KEY (epoch, peer)) WITHOUT ROWID;
CREATE TABLE rounds (epoch INTEGER, peer TEXT, number INTEGER, {", ".join(_ROUND[2:])},
                     PRIMARY KEY (epoch, peer, number)) WITHOUT ROWID;
CREATE TABLE heldout (epoch INTEGER, peer TEXT, loss REAL, PRIMARY KEY (epoch, peer)) WITHOUT ROWID;
CREATE TABLE ticks (at REAL PRIMARY KEY, peers INTEGER, tokens_per_s REAL, joined INTEGER, gone INTEGER) WITHOUT ROWID;
CREATE TABLE events (id INTEGER PRIMARY KEY, at REAL, kind TEXT, peer TEXT, text TEXT);
CREATE TABLE members (peer TEXT PRIMARY KEY, presence TEXT, first_seen REAL, last_seen REAL) WITHOUT ROWID;
"""
_KIND = Kind("history", "dashboard", "pass another --db", application_id=0x68697664, version=1, schema=_SCHEMA)
_NAN = "nan"  # SQLite turns NaN into NULL, which means "none" here


@dataclass(frozen=True)
class Tick:
    """The swarm at one moment; ``joined`` and ``gone`` count since the tick before."""

    at: float
    peers: int
    tokens_per_s: float
    joined: int = 0
    gone: int = 0


class History:
    """A run's past, written by one thread and read by several.

    Args:
        path: the file, created if there is none; ``:memory:`` forgets everything at the end.
        run_id: of the run; a file is of one run.
    """

    def __init__(self, path: str | Path, run_id: str) -> None:
        self.run_id = run_id
        self._file = SqliteFile(path, _KIND)

    def open(self) -> None:
        """Takes the file.

        Raises:
            UserError: another dashboard has it, it is of another run, or it is no history of this version.
        """
        self._file.open(run_id=self.run_id)
        self._file.write("PRAGMA synchronous = NORMAL")

    def close(self) -> None:
        """Lets go of the file; may be called twice."""
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes, without what was written just now."""
        ((pages, page_size),) = self._file.rows("SELECT page_count, page_size FROM pragma_page_count, pragma_page_size")
        return int(pages * page_size)

    def add_notes(
        self,
        at: float,
        notes: Iterable[tuple[str, EpochNote]],
        rounds: Iterable[tuple[str, RoundNote]],
        heldout: Iterable[tuple[str, int, float]],
    ) -> list[EpochLine]:
        """Takes in what peers (by id) say of epochs; returns the lines that are other than before."""
        touched: set[int] = set()
        with self._file.transaction() as db:
            for peer, note in notes:
                loss = _NAN if note.loss is not None and note.loss != note.loss else note.loss
                touched |= self._put(db, "notes", (note.epoch, peer, loss, note.samples))
            for peer, entry in rounds:
                touched |= self._put(db, "rounds", (entry.epoch, peer, entry.number, *astuple(entry)[2:]))
            for peer, epoch, loss in heldout:
                touched |= self._put(db, "heldout", (epoch, peer, loss))
            changed = [line for epoch in sorted(touched) if (line := self._renew(db, epoch, at)) is not None]
            if touched:
                for table in ("notes", "rounds", "heldout"):
                    db.execute(f"DELETE FROM {table} WHERE epoch < ?", (max(touched) - KEPT_NOTES,))
        return changed

    def add_tick(self, tick: Tick) -> None:
        """Adds a moment."""
        self._file.write("INSERT OR REPLACE INTO ticks VALUES (?, ?, ?, ?, ?)", *astuple(tick))

    def add_events(self, events: Sequence[Event]) -> None:
        """Adds events and forgets the oldest ones."""
        with self._file.transaction() as db:
            rows = [astuple(event) for event in events]
            db.executemany("INSERT INTO events (at, kind, peer, text) VALUES (?, ?, ?, ?)", rows)
            db.execute("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", (MAX_EVENTS,))

    def keep_members(self, members: Sequence[Member]) -> None:
        """Replaces what is known of the peers."""
        rows = [(member.peer_id, str(member.presence), member.first_seen, member.last_seen) for member in members]
        with self._file.transaction() as db:
            db.execute("DELETE FROM members")
            db.executemany("INSERT INTO members VALUES (?, ?, ?, ?)", rows)

    def members(self) -> list[Member]:
        """The peers as they were kept."""
        rows = self._file.rows("SELECT peer, presence, first_seen, last_seen FROM members")
        return [Member(peer, b"", Presence(presence), first, last) for peer, presence, first, last in rows]

    def last_epochs(self, number: int) -> list[EpochLine]:
        """The latest lines, in order."""
        rows = self._file.rows(f"SELECT {', '.join(_LINE)} FROM epochs ORDER BY epoch DESC LIMIT ?", number)
        return [EpochLine(*row) for row in reversed(rows)]

    def last_events(self, number: int) -> list[Event]:
        """The latest events, the last one first."""
        rows = self._file.rows("SELECT at, kind, peer, text FROM events ORDER BY id DESC LIMIT ?", number)
        return [Event(*row) for row in rows]

    def epoch_series(self, points: int) -> dict[str, list[Any]]:
        """Columns over the swarm epochs with at most ``points`` rows: of each stretch the mean and the extremes."""
        span = self._file.rows("SELECT min(epoch), max(epoch) FROM epochs")[0]
        width = 1 if span[0] is None else max(1, -(-(span[1] - span[0] + 1) // max(1, points)))
        columns = ("epoch", "loss", "loss_low", "loss_high", "heldout_loss", "exchange_s", "group_size", "failed")
        rows = self._file.rows(
            "SELECT max(epoch), avg(loss), min(loss_low), max(loss_high), avg(heldout_loss), avg(exchange_s), "
            "avg(group_size), sum(failed) FROM epochs GROUP BY (epoch - ?) / ? ORDER BY 1",
            span[0] or 0, width,
        )  # fmt: skip
        return {"width": [width], **_columns(columns, rows)}

    def tick_series(self, points: int) -> dict[str, list[Any]]:
        """Columns over time with at most ``points`` rows."""
        first, last = self._file.rows("SELECT min(at), max(at) FROM ticks")[0]
        width = max(1.0, (last - first) / max(1, points - 1)) if first is not None else 1.0
        rows = self._file.rows(
            "SELECT max(at), avg(peers), min(peers), max(peers), avg(tokens_per_s), sum(joined), sum(gone) "
            "FROM ticks GROUP BY CAST((at - ?) / ? AS INTEGER) ORDER BY 1",
            first or 0.0, width,
        )  # fmt: skip
        names = ("at", "peers", "peers_low", "peers_high", "tokens_per_s", "joined", "gone")
        return _columns(names, rows)

    def prune_ticks(self, before: float, keep_every_s: float) -> None:
        """Thins out old moments: of each stretch of ``keep_every_s`` the last one stays, and every join and loss."""
        self._file.write(
            "DELETE FROM ticks WHERE at < ? AND joined = 0 AND gone = 0 AND at NOT IN "
            "(SELECT max(at) FROM ticks WHERE at < ? GROUP BY CAST(at / ? AS INTEGER))",
            before, before, keep_every_s,
        )  # fmt: skip

    def _put(self, db: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> set[int]:
        """Writes a row; returns its epoch if that changed anything."""
        marks = ", ".join("?" * len(row))
        differs = " OR ".join(f"{name} IS NOT excluded.{name}" for name in _VALUES[table])
        updates = ", ".join(f"{name} = excluded.{name}" for name in _VALUES[table])
        done = db.execute(
            f"INSERT INTO {table} VALUES ({marks}) ON CONFLICT DO UPDATE SET {updates} WHERE {differs}", row
        )
        return {row[0]} if done.rowcount else set()

    def _renew(self, db: sqlite3.Connection, epoch: int, at: float) -> EpochLine | None:
        notes = [
            EpochNote(epoch, float("nan") if loss == _NAN else loss, samples)
            for loss, samples in db.execute("SELECT loss, samples FROM notes WHERE epoch = ?", (epoch,))
        ]
        query = f"SELECT {', '.join(_ROUND)} FROM rounds WHERE epoch = ?"
        rounds = [RoundNote(*row) for row in db.execute(query, (epoch,))]
        heldout = [row[0] for row in db.execute("SELECT loss FROM heldout WHERE epoch = ?", (epoch,))]
        before = db.execute(f"SELECT {', '.join(_LINE)} FROM epochs WHERE epoch = ?", (epoch,)).fetchone()
        line = epoch_line(epoch, before[1] if before else at, notes, rounds, heldout)
        if before is not None and EpochLine(*before) == line:
            return None
        marks = ", ".join("?" * len(_LINE))
        db.execute(f"INSERT OR REPLACE INTO epochs ({', '.join(_LINE)}) VALUES ({marks})", astuple(line))
        return line


def _columns(names: Sequence[str], rows: Sequence[sqlite3.Row]) -> dict[str, list[Any]]:
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}
