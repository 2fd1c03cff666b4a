"""The file of a ledger: schema, connections and transactions.

Surprising fact: SQLite connections must not cross a fork, and training programs fork (data loaders). A connection
therefore belongs to the process that opened it; a forked child opens its own and leaves the inherited one alone.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hivetrain.chain.base import Code, Deadline, LedgerError
from hivetrain.sqlite_file import all_or_nothing

VERSION = 1
_APPLICATION_ID = 0x68697665
_SCHEMA = """
CREATE TABLE chain (id INTEGER PRIMARY KEY CHECK (id = 1), block INTEGER NOT NULL, origin_s REAL NOT NULL,
                    rules TEXT NOT NULL);
CREATE TABLE blocks (number INTEGER PRIMARY KEY, hash TEXT NOT NULL);
CREATE TABLE accounts (hotkey TEXT PRIMARY KEY, stake REAL NOT NULL DEFAULT 0, funds REAL NOT NULL DEFAULT 0,
                       earned REAL NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE neurons (uid INTEGER PRIMARY KEY, hotkey TEXT NOT NULL UNIQUE, registered_at INTEGER NOT NULL,
                      last_update INTEGER NOT NULL, permit INTEGER NOT NULL DEFAULT 0,
                      incentive REAL NOT NULL DEFAULT 0, dividends REAL NOT NULL DEFAULT 0,
                      emission REAL NOT NULL DEFAULT 0, ip TEXT, port INTEGER, weights BLOB, bonds BLOB);
CREATE TABLE commits (id INTEGER PRIMARY KEY, uid INTEGER NOT NULL, epoch INTEGER NOT NULL, weights BLOB NOT NULL);
CREATE TABLE epochs (number INTEGER PRIMARY KEY, block INTEGER NOT NULL, paid REAL NOT NULL);
CREATE TABLE nonces (hotkey TEXT NOT NULL, nonce INTEGER NOT NULL, expires INTEGER NOT NULL,
                     PRIMARY KEY (hotkey, nonce)) WITHOUT ROWID;
CREATE INDEX nonces_by_expiry ON nonces (expires);
"""


class Store:
    """One ledger file, shared by any number of threads and processes of one host.

    Args:
        path: the file; it must exist, see :func:`create`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._owner = 0
        self._closed = False

    @contextmanager
    def transaction(self, deadline: Deadline, *, write: bool) -> Iterator[sqlite3.Connection]:
        """A transaction that commits at the end of the block and rolls back on any exception.

        Raises:
            LedgerError: UNREACHABLE when others keep the file locked past the deadline, or it is missing;
                INCOMPATIBLE when it is no ledger of this version; CLOSED after :meth:`close`.
        """
        if not self._lock.acquire(timeout=deadline.check("waiting for the ledger")):
            raise LedgerError(Code.UNREACHABLE, "the deadline passed while another thread used the ledger")
        try:
            with _translated(self.path):
                connection = self._open()
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * deadline.check('opening the ledger')) + 1}")
                with all_or_nothing(connection, "BEGIN IMMEDIATE" if write else "BEGIN"):
                    yield connection
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the file; may be called twice."""
        with self._lock:
            self._closed = True
            if self._connection is not None and self._owner == os.getpid():
                self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise LedgerError(Code.CLOSED, "this ledger was closed")
        if self._connection is None or self._owner != os.getpid():
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA synchronous = NORMAL")
                found = [
                    connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
                ]
            except BaseException:
                connection.close()
                raise
            if found != [_APPLICATION_ID, VERSION]:
                connection.close()
                raise LedgerError(Code.INCOMPATIBLE, f"{self.path} is not a ledger of version {VERSION}")
            self._connection, self._owner = connection, os.getpid()
        return self._connection


def create(path: str | Path, origin_s: float, rules_json: str, first_hash: str) -> None:
    """Write a new ledger at block 1.

    Raises:
        FileExistsError: there is a file already; it is left as it is.
    """
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    connection = sqlite3.connect(draft, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
        connection.execute("INSERT INTO chain VALUES (1, 1, ?, ?)", (origin_s, rules_json))
        connection.execute("INSERT INTO blocks VALUES (1, ?)", (first_hash,))
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.close()
        os.link(draft, file)
    finally:
        connection.close()
        for leftover in (draft, draft.with_name(draft.name + "-wal"), draft.with_name(draft.name + "-shm")):
            leftover.unlink(missing_ok=True)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if not path.exists():
            hint = f"there is no ledger at {path}: create it with: hivetrain ledger create {path}"
            raise LedgerError(Code.UNREACHABLE, hint) from None
        raise LedgerError(Code.UNREACHABLE, f"the ledger {path} did not answer in time: {error}") from error
    except sqlite3.DatabaseError as error:
        if isinstance(error, (sqlite3.IntegrityError, sqlite3.ProgrammingError)):
            raise
        raise LedgerError(Code.INCOMPATIBLE, f"{path} is no ledger: {error}") from error
