"""The file in which a validator keeps everything it has seen and decided.

Surprising fact: nothing is kept in memory that a verdict or a weight depends on, so a validator that is killed at any
moment goes on from here as if it had only been slow.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hivetrain.errors import UserError

VERSION = 1
_APPLICATION_ID = 0x68697676
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE polls (id INTEGER PRIMARY KEY, began INTEGER NOT NULL, ended INTEGER NOT NULL,
                    first_epoch INTEGER NOT NULL, last_epoch INTEGER NOT NULL, current INTEGER NOT NULL);
CREATE TABLE rounds (epoch INTEGER PRIMARY KEY, digest TEXT NOT NULL, members TEXT, sketch BLOB,
                     sum_error REAL, sum_tolerance REAL);
CREATE TABLE records (commitment BLOB PRIMARY KEY, hotkey TEXT NOT NULL, swarm_epoch INTEGER NOT NULL,
                      slot INTEGER NOT NULL, peer_id TEXT NOT NULL, samples INTEGER NOT NULL,
                      beacon INTEGER NOT NULL, due INTEGER NOT NULL, seen INTEGER NOT NULL,
                      sealed BLOB, reveal BLOB, exchanged INTEGER NOT NULL DEFAULT 0,
                      drawn TEXT, beacon_hash TEXT,
                      looked_in INTEGER NOT NULL DEFAULT 0, looked_after INTEGER NOT NULL DEFAULT 0,
                      verdict TEXT, reason TEXT NOT NULL DEFAULT '', note TEXT NOT NULL DEFAULT '',
                      leaves TEXT NOT NULL DEFAULT '[]', tempo INTEGER);
CREATE INDEX records_by_hotkey ON records (hotkey, swarm_epoch);
CREATE INDEX records_open ON records (swarm_epoch, hotkey, commitment) WHERE verdict IS NULL;
CREATE INDEX records_unscored ON records (due) WHERE tempo IS NULL;
CREATE TABLE positions (hotkey TEXT NOT NULL, swarm_epoch INTEGER NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
                        PRIMARY KEY (hotkey, swarm_epoch)) WITHOUT ROWID;
CREATE TABLE tempos (block INTEGER PRIMARY KEY, scored_at INTEGER NOT NULL, scores TEXT NOT NULL,
                     averages TEXT NOT NULL, weights TEXT NOT NULL, status TEXT NOT NULL,
                     attempts INTEGER NOT NULL DEFAULT 0, sent_block INTEGER, sent_after INTEGER,
                     retry_block INTEGER NOT NULL DEFAULT 0, receipt TEXT NOT NULL DEFAULT '');
"""


class Database:
    """One state file, open in one validator at a time.

    Args:
        path: the file; created if there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._connection: sqlite3.Connection | None = None
        self._lock: int | None = None

    def open(self) -> None:
        """Takes the file.

        Raises:
            UserError: another validator has it open, or it is no state file of this version.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Not flock: a forked DHT process would inherit that, and hold it when this process has been killed.
            self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._connection = sqlite3.connect(self.path, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._prepare(self._connection)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.path} is in use: another validator runs with it") from None
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise UserError(f"cannot open the state file {self.path}: {error}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the file; may be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is written inside is kept, or nothing."""
        assert self._connection is not None, "the state file is open"
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        assert self._connection is not None, "the state file is open"
        return self._connection.execute(query, values).fetchall()

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        return next(iter(self.rows(query, *values)), None)

    def write(self, statement: str, *values: Any) -> int:
        """Executes a statement; returns the number of rows changed."""
        assert self._connection is not None, "the state file is open"
        return self._connection.execute(statement, values).rowcount

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        if found == [0, 0] and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            pragmas = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {VERSION};"
            connection.executescript(f"BEGIN; {_SCHEMA} {pragmas} COMMIT;")
        else:
            check_version(self.path, *found)


def check_version(path: Path, application_id: int, version: int) -> None:
    """Raises UserError unless these are a state file's."""
    if application_id != _APPLICATION_ID:
        raise UserError(f"{path} is not a validator's state file: choose another path")
    if version != VERSION:
        raise UserError(
            f"{path} is of version {version}, this program writes version {VERSION}: move the file away to begin anew"
        )


def open_read_only(path: str | Path) -> sqlite3.Connection:
    """A connection for looking, also while a validator runs.

    Raises:
        UserError: there is no state file.
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"there is no state file {file}: pass --state, as the validator's configuration has it")
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA busy_timeout = 5000")
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
    except sqlite3.Error as error:
        raise UserError(f"cannot read the state file {file}: {error}") from None
    check_version(file, *found)
    return connection
