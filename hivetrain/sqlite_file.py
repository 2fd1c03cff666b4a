"""A SQLite file that one program has to itself: what is in it, who has it, transactions.

Surprising fact: the lock is a file of its own beside it. A process loses its locks on a file as soon as it closes any
descriptor of it, and SQLite opens and closes its files as it likes.
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hivetrain.errors import UserError

IN_MEMORY = ":memory:"


@dataclass(frozen=True)
class Kind:
    """What a file must be.

    Attributes:
        name: of such a file, for people.
        owner: what has it open, for people.
        hint: what to do where it cannot be used.
        application_id: in its header.
        version: in its header.
        schema: SQL statements that make its tables; one is ``facts``, with ``name`` and ``value``.
    """

    name: str
    owner: str
    hint: str
    application_id: int
    version: int
    schema: str

    def check(self, path: Path, connection: sqlite3.Connection) -> None:
        """Raises UserError unless an open file is of this kind and version."""
        application_id, version = _header(connection)
        if application_id != self.application_id:
            raise UserError(f"{path} is not a {self.owner}'s {self.name}: {self.hint}")
        if version != self.version:
            raise UserError(
                f"{path} is of version {version}, this program writes version {self.version}: "
                f"move the file away to begin anew, or {self.hint}"
            )


class SqliteFile:
    """One file, open in one program at a time; its threads may share it.

    Args:
        path: the file, created if there is none; ``:memory:`` forgets everything at the end.
        kind: what it is.
    """

    def __init__(self, path: str | Path, kind: Kind) -> None:
        self.path = Path(path).expanduser()
        self._kind = kind
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._lock: int | None = None

    def open(self, **facts: str) -> None:
        """Takes the file; ``facts`` are what it must have been begun with.

        Raises:
            UserError: another program has it, it was begun with other facts, or it is not of this kind and version.
        """
        kind = self._kind
        try:
            if self.path != Path(IN_MEMORY):
                self._take()
            self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._connection.row_factory = sqlite3.Row
            self._prepare(self._connection)
            self._agree(facts)
        except BlockingIOError:
            self.close()
            raise UserError(f"{self.path} is in use: another {kind.owner} runs with it; {kind.hint}") from None
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise UserError(f"cannot open the {kind.name} {self.path}: {error}; {kind.hint}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the file; may be called twice."""
        with self._mutex:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is written inside is kept, or nothing; other threads wait."""
        with self._mutex, all_or_nothing(self._opened, "BEGIN IMMEDIATE") as connection:
            yield connection

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """All rows of a query."""
        with self._mutex:
            return self._opened.execute(query, values).fetchall()

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        return next(iter(self.rows(query, *values)), None)

    def write(self, statement: str, *values: Any) -> int:
        """Executes a statement; returns the number of rows changed."""
        with self._mutex:
            return self._opened.execute(statement, values).rowcount

    @property
    def _opened(self) -> sqlite3.Connection:
        assert self._connection is not None, f"the {self._kind.name} is open"
        return self._connection

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Not flock: a forked DHT process would inherit that, and hold it when this process has been killed.
        self._lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        kind = self._kind
        connection.execute("PRAGMA journal_mode = WAL")
        if _header(connection) == (0, 0) and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            pragmas = f"PRAGMA application_id = {kind.application_id}; PRAGMA user_version = {kind.version};"
            connection.executescript(f"BEGIN; {kind.schema} {pragmas} COMMIT;")
        else:
            kind.check(self.path, connection)

    def _agree(self, facts: dict[str, str]) -> None:
        with self.transaction():
            for name, value in facts.items():
                row = self.one("SELECT value FROM facts WHERE name = ?", name)
                if row is None:
                    self.write("INSERT INTO facts VALUES (?, ?)", name, value)
                elif row[0] != value:
                    raise UserError(f"{self.path} is of {name} {row[0]}, not {value}: {self._kind.hint}")


def _header(connection: sqlite3.Connection) -> tuple[int, int]:
    """Application id and version."""
    return tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))


@contextmanager
def all_or_nothing(connection: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
    """A transaction that the statement ``begin`` opens: committed at the end of the block, undone by an exception."""
    connection.execute(begin)
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
