"""One epoch of a ledger, inside the caller's transaction: reveal sealed weights, run Yuma, pay, renew permits.

Surprising fact: rows are stored by uid as the chain does, so a row may still name a uid that changed hands; Yuma itself
ignores every weight that is not newer than the registration it points at.
"""

import sqlite3

import numpy as np
from numpy.typing import NDArray

from hivetrain.chain import yuma
from hivetrain.chain.base import Rules


def run_epoch(db: sqlite3.Connection, block: int, rules: Rules) -> None:
    """Apply the epoch that ends at ``block``; the table of epochs refuses a second time."""
    number = block // rules.tempo
    _reveal(db, number)
    rows = db.execute(
        "SELECT n.uid, n.hotkey, n.registered_at, n.last_update, n.permit, n.weights, n.bonds, "
        "coalesce(a.stake, 0) FROM neurons n LEFT JOIN accounts a USING (hotkey) ORDER BY n.uid"
    ).fetchall()
    size = len(rows)
    owner = next((row[0] for row in rows if row[1] == rules.owner), None)
    result = yuma.epoch(
        block=block,
        stake=np.array([row[7] for row in rows], dtype=np.float64),
        last_update=np.array([row[3] for row in rows], dtype=np.int64),
        registered_at=np.array([row[2] for row in rows], dtype=np.int64),
        permits=np.array([row[4] for row in rows], dtype=np.bool_),
        weights=_dense_weights([row[5] for row in rows], size),
        bonds=_dense_bonds([row[6] for row in rows], size),
        activity_cutoff=rules.activity_cutoff,
        max_validators=rules.max_validators,
        stake_threshold=rules.stake_threshold,
        kappa=rules.kappa,
        alpha=rules.bonds_alpha,
        beta=rules.bonds_beta,
        owner=owner,
    )
    pay = result.shares * (rules.emission_per_block * rules.tempo)
    db.execute("INSERT INTO epochs VALUES (?, ?, ?)", (number, block, float(pay.sum())))
    db.executemany(
        "UPDATE neurons SET permit = ?, incentive = ?, dividends = ?, emission = ?, bonds = ? WHERE uid = ?",
        [
            (
                bool(result.permits[uid]),
                float(result.incentive[uid]),
                float(result.dividends[uid]),
                float(pay[uid]),
                result.bonds[uid].tobytes() if result.bonds[uid].any() else None,
                uid,
            )
            for uid in range(size)
        ],
    )
    db.executemany(
        "INSERT INTO accounts (hotkey, earned) VALUES (?, ?) "
        "ON CONFLICT (hotkey) DO UPDATE SET earned = earned + excluded.earned",
        [(row[1], float(pay[row[0]])) for row in rows if pay[row[0]] > 0],
    )


def pack_row(row: dict[int, int]) -> bytes:
    """A row of u16 weights as stored: pairs of uid and value."""
    return np.array(sorted(row.items()), dtype="<u2").tobytes()


def unpack_row(blob: bytes | None) -> NDArray[np.uint16]:
    """(k, 2) pairs of uid and value."""
    return np.frombuffer(blob or b"", dtype="<u2").reshape(-1, 2)


def forget_bonds(db: sqlite3.Connection, uid: int) -> None:
    """Nobody holds a bond in whoever takes over ``uid``."""
    for other, blob in db.execute("SELECT uid, bonds FROM neurons WHERE bonds IS NOT NULL").fetchall():
        bonds = np.frombuffer(blob, dtype=np.float64).copy()
        if uid < len(bonds) and bonds[uid]:
            bonds[uid] = 0.0
            db.execute("UPDATE neurons SET bonds = ? WHERE uid = ?", (bonds.tobytes(), other))


def _reveal(db: sqlite3.Connection, number: int) -> None:
    """Sealed rows whose epoch this is become weights, in the order of their commits; older ones expired."""
    due = db.execute("SELECT uid, weights FROM commits WHERE epoch = ? ORDER BY id", (number,)).fetchall()
    db.executemany("UPDATE neurons SET weights = ? WHERE uid = ?", [(blob, uid) for uid, blob in due])
    db.execute("DELETE FROM commits WHERE epoch <= ?", (number,))


def _dense_weights(blobs: list[bytes | None], size: int) -> yuma.Matrix:
    dense = np.zeros((size, size))
    for uid, blob in enumerate(blobs):
        pairs = unpack_row(blob)
        dense[uid, pairs[:, 0]] = pairs[:, 1]
    return dense


def _dense_bonds(blobs: list[bytes | None], size: int) -> yuma.Matrix:
    dense = np.zeros((size, size))
    for uid, blob in enumerate(blobs):
        if blob:
            row = np.frombuffer(blob, dtype=np.float64)
            dense[uid, : len(row)] = row
    return dense
