"""The file in which a validator keeps everything it has seen and decided.

Surprising fact: nothing is kept in memory that a verdict or a weight depends on, so a validator that is killed at any
moment goes on from here as if it had only been slow.
"""

import sqlite3
from pathlib import Path

from hivetrain.errors import UserError
from hivetrain.sqlite_file import Kind, SqliteFile

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE polls (id INTEGER PRIMARY KEY, began INTEGER NOT NULL, ended INTEGER NOT NULL,
                    first_epoch INTEGER NOT NULL, last_epoch INTEGER NOT NULL, current INTEGER NOT NULL);
CREATE TABLE rounds (epoch INTEGER PRIMARY KEY, digest TEXT NOT NULL, members TEXT, sketch BLOB,
                     sum_error REAL, sum_tolerance REAL, unrecorded INTEGER);
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


_KIND = Kind("state file", "validator", "choose another path", application_id=0x68697676, version=2, schema=_SCHEMA)


class Database(SqliteFile):
    """One state file, open in one validator at a time.

    Args:
        path: the file; created if there is none.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, _KIND)


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
        _KIND.check(file, connection)
    except sqlite3.Error as error:
        raise UserError(f"cannot read the state file {file}: {error}") from None
    return connection
