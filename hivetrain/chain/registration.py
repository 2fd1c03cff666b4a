"""Who holds which uid of a ledger, inside the caller's transaction.

Surprising fact: uids are never given up, only taken over. On a full subnet every newcomer evicts somebody.
"""

import sqlite3

from hivetrain.chain.base import Code, LedgerError, Outcome, Receipt, Rules
from hivetrain.chain.epochs import forget_bonds


def register(db: sqlite3.Connection, block: int, rules: Rules, hotkey: str) -> Receipt:
    """Give ``hotkey`` a uid; free and without effect if it holds one.

    Raises:
        LedgerError: CLOSED, FUNDS or FULL.
    """
    found = db.execute("SELECT uid FROM neurons WHERE hotkey = ?", (hotkey,)).fetchone()
    if found:
        return Receipt(Outcome.APPLIED, block, detail=f"was registered already, uid {found[0]}")
    if not rules.registration_open:
        raise LedgerError(Code.CLOSED, "registration is closed on this subnet")
    _charge(db, rules.registration_cost, hotkey)
    uid = _take_uid(db, block, rules)
    db.execute(
        "INSERT INTO neurons (uid, hotkey, registered_at, last_update) VALUES (?, ?, ?, ?)", (uid, hotkey, block, block)
    )
    return Receipt(Outcome.APPLIED, block, detail=f"registered, uid {uid}")


def own_row(db: sqlite3.Connection, hotkey: str) -> tuple[int, int, bool, float]:
    """uid, last_update, permit and stake of a registered hotkey.

    Raises:
        LedgerError: NOT_REGISTERED.
    """
    row = db.execute(
        "SELECT n.uid, n.last_update, n.permit, coalesce(a.stake, 0) FROM neurons n "
        "LEFT JOIN accounts a USING (hotkey) WHERE n.hotkey = ?",
        (hotkey,),
    ).fetchone()
    if row is None:
        raise LedgerError(Code.NOT_REGISTERED, f"{hotkey} holds no uid: run hivetrain chain register")
    return row[0], row[1], bool(row[2]), row[3]


def _charge(db: sqlite3.Connection, cost: float, hotkey: str) -> None:
    if not cost:
        return
    paid = db.execute("UPDATE accounts SET funds = funds - ? WHERE hotkey = ? AND funds >= ?", (cost, hotkey, cost))
    if paid.rowcount != 1:
        raise LedgerError(Code.FUNDS, f"registration costs {cost:g} and the hotkey has less")


def _take_uid(db: sqlite3.Connection, block: int, rules: Rules) -> int:
    """A free uid, or that of the neuron which has to go.

    Goes: the lowest (emission, registered_at, uid) of the non-immune if more than ``min_non_immune`` of them exist,
    else of the immune. The owner's hotkey never goes.
    """
    rows = db.execute("SELECT emission, registered_at, uid, hotkey FROM neurons").fetchall()
    if len(rows) < rules.max_uids:
        return len(rows)
    candidates = [row[:3] for row in rows if row[3] != rules.owner]
    immune = [row for row in candidates if block - row[1] < rules.immunity_period]
    others = [row for row in candidates if block - row[1] >= rules.immunity_period]
    choice = others if len(others) > rules.min_non_immune else immune
    if not choice:
        raise LedgerError(Code.FULL, "all uids are taken and none may be evicted now")
    uid = int(min(choice)[2])
    db.execute("DELETE FROM neurons WHERE uid = ?", (uid,))
    db.execute("DELETE FROM commits WHERE uid = ?", (uid,))
    forget_bonds(db, uid)
    return uid
