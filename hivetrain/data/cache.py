"""Tokens of units on disk, so that a second pass does not tokenize again.

One SQLite file for any number of data sets and processes. The surprising fact: it stores the joined tokens, not the
blocks, so runs of different block sizes share it. Without room on the disk it keeps what it has and ends nothing.
"""

import errno
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hivetrain.data.errors import DataError
from hivetrain.data.packing import Tokens

logger = logging.getLogger(__name__)

# What SQLite calls a quota or a limit on file sizes is a failed write; the last one is its index of the journal.
_NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
_NO_ROOM_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS units (
    name TEXT, unit INTEGER, dtype TEXT, tokens BLOB, sha256 BLOB, size INTEGER, used REAL, PRIMARY KEY (name, unit)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON units (used, name, unit, size);
"""


class TokenCache:
    """Least recently used units are dropped once the tokens exceed the limit.

    Args:
        folder: Where the file goes; created on first use.
        limit_bytes: Most bytes of tokens to keep; the file itself is a few per cent larger.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self.path = Path(folder) / "tokens.sqlite"
        self.limit_bytes = limit_bytes
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._told = False

    def get(self, name: str, unit: int) -> Tokens | None:
        """Tokens of a unit, or None where the cache does not have them.

        Args:
            name: Names manifest and vocabulary together.
            unit: Index of the unit.
        """
        found: Tokens | None = None
        with self._unless_full(), self._transaction() as database:
            where = (name, unit)
            row = database.execute("SELECT dtype, tokens, sha256 FROM units WHERE name=? AND unit=?", where).fetchone()
            if row is None:
                return None
            dtype, content, sha256 = row
            if hashlib.sha256(content).digest() != sha256 or dtype not in ("uint16", "uint32"):
                logger.warning("%s: unit %d is damaged and is tokenized again", self.path, unit)
                database.execute("DELETE FROM units WHERE name=? AND unit=?", where)
                return None
            found = np.frombuffer(content, dtype=np.dtype(dtype).newbyteorder("<"))
            database.execute("UPDATE units SET used=? WHERE name=? AND unit=?", (time.time(), *where))
        return found

    def put(self, name: str, unit: int, tokens: Tokens) -> None:
        """Keep the tokens of a unit, if the disk has room; drops others where the limit asks for it."""
        content = tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()
        if len(content) > self.limit_bytes:
            return
        row = (name, unit, tokens.dtype.name, content, hashlib.sha256(content).digest(), len(content), time.time())
        with self._unless_full(), self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO units VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            excess = database.execute("SELECT total(size) FROM units").fetchone()[0] - self.limit_bytes
            oldest = database.execute("SELECT name, unit, size FROM units ORDER BY used") if excess > 0 else ()
            drop = []
            for old_name, old_unit, size in oldest:
                if excess <= 0:
                    break
                drop.append((old_name, old_unit))
                excess -= size
            database.executemany("DELETE FROM units WHERE name=? AND unit=?", drop)

    def close(self) -> None:
        """Release the file; the next use opens it again."""
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        self._connection = None

    @contextmanager
    def _unless_full(self) -> Iterator[None]:
        try:
            yield
        except _NoRoom as error:
            if not self._told:
                logger.warning("%s The training goes on; what does not fit is tokenized again when needed.", error)
            self._told = True

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None or self._pid != os.getpid():
                # A connection must not be used on both sides of a fork.
                self._connection, self._pid = self._open(), os.getpid()
            with self._connection:
                yield self._connection
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorcode", None) in _NO_ROOM or getattr(error, "errno", None) in _NO_ROOM_ERRNO:
                raise _NoRoom(f"token cache {self.path}: {error}. Free some space there.") from error
            raise DataError(f"token cache {self.path}: {error}. Delete it, or choose another cache_dir.") from error

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60.0)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(_SCHEMA)
        return connection

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_connection": None, "_pid": 0}


class _NoRoom(DataError):
    """The disk is full, or a quota is used up."""
