"""A whole subnet in one SQLite file: clock, registration, stake, weights, epochs, block hashes.

Surprising fact: blocks appear when somebody looks. The first process that comes after a block's time draws the block's
hash from the operating system's randomness, so no hash exists before its block; a ledger that nobody used for 64 tempos
stood still meanwhile, as a chain without nodes does.
"""

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hivetrain.chain.base import Code, Deadline, LedgerError, Neuron, Outcome, Receipt, Rules, Snapshot
from hivetrain.chain.epochs import pack_row, run_epoch, unpack_row
from hivetrain.chain.registration import own_row, register
from hivetrain.chain.store import Store, create
from hivetrain.chain.weights import check_endpoint, check_row, split_registered, to_u16
from hivetrain.keys import MAX_AGE_S, MAX_SKEW_S, is_address

IDLE_TEMPOS = 64
KEPT_HASHES = 16384


@dataclass(frozen=True)
class _Moment:
    """An open transaction and the block it happens at."""

    db: sqlite3.Connection
    block: int
    rules: Rules


class Ledger:
    """The ledger itself, for whoever may write its file; :class:`LocalChain` is one hotkey's view of it.

    Args:
        path: file made by :meth:`create`.
        now: seconds since 1970; drives the blocks.
    """

    def __init__(self, path: str | Path, now: Callable[[], float] = time.time) -> None:
        self._store = Store(path)
        self._now = now

    @staticmethod
    def create(path: str | Path, rules: Rules | None = None, now: Callable[[], float] = time.time) -> None:
        """Write a new ledger at block 1.

        Raises:
            FileExistsError: there is a file already; it is left as it is.
        """
        create(path, now(), json.dumps(asdict(rules or Rules())), _draw_hash())

    def close(self) -> None:
        self._store.close()

    # Reads

    def snapshot(self, deadline: Deadline) -> Snapshot:
        with self._reading(deadline) as at:
            rows = at.db.execute(
                "SELECT n.uid, n.hotkey, coalesce(a.stake, 0), n.last_update, n.registered_at, n.permit, n.incentive, "
                "n.dividends, n.emission, n.ip, n.port FROM neurons n LEFT JOIN accounts a USING (hotkey) "
                "ORDER BY n.uid"
            ).fetchall()
            block_hash = at.db.execute("SELECT hash FROM blocks WHERE number = ?", (at.block,)).fetchone()[0]
        neurons = tuple(
            Neuron(
                uid=uid,
                hotkey=hotkey,
                stake=stake,
                active=last_update + at.rules.activity_cutoff >= at.block,
                permit=bool(permit),
                last_update=last_update,
                registered_at=registered_at,
                incentive=incentive,
                dividends=dividends,
                emission=emission,
                ip=ip,
                port=port,
            )
            for uid, hotkey, stake, last_update, registered_at, permit, incentive, dividends, emission, ip, port in rows
        )
        return Snapshot(at.block, block_hash, _next_epoch(at.block, at.rules), at.rules, neurons)

    def clock(self, deadline: Deadline) -> tuple[int, float | None]:
        """The current block, and the seconds to the next one (None if only the operator makes blocks)."""
        with self._reading(deadline) as at:
            if not at.rules.block_time_s:
                return at.block, None
            _, origin_s, _ = _state(at.db)
            return at.block, max(0.0, origin_s + at.block * at.rules.block_time_s - self._now())

    def block_hash(self, block: int, deadline: Deadline) -> str | None:
        with self._reading(deadline) as at:
            row = at.db.execute("SELECT hash FROM blocks WHERE number = ?", (block,)).fetchone()
        return str(row[0]) if row else None

    def weights(self, deadline: Deadline) -> dict[str, dict[str, float]]:
        with self._reading(deadline) as at:
            rows = at.db.execute("SELECT uid, hotkey, last_update, registered_at, weights FROM neurons").fetchall()
        names = {uid: (hotkey, registered_at) for uid, hotkey, _, registered_at, _ in rows}
        found: dict[str, dict[str, float]] = {}
        for _, hotkey, last_update, _, blob in rows:
            pairs = [(names[uid][0], value) for uid, value in unpack_row(blob).tolist() if last_update > names[uid][1]]
            total = sum(value for _, value in pairs)
            if total:
                found[hotkey] = {miner: value / total for miner, value in pairs}
        return found

    def earnings(self, deadline: Deadline) -> dict[str, float]:
        """All that each hotkey ever earned; outlives its registration."""
        with self._reading(deadline) as at:
            return dict(at.db.execute("SELECT hotkey, earned FROM accounts WHERE earned > 0").fetchall())

    # What a hotkey does

    def register(self, hotkey: str, deadline: Deadline) -> Receipt:
        _check_address(hotkey)
        with self._writing(deadline) as at:
            return register(at.db, at.block, at.rules, hotkey)

    def publish(self, hotkey: str, ip: str, port: int, deadline: Deadline) -> Receipt:
        with self._writing(deadline) as at:
            ip = check_endpoint(ip, port, at.rules.allow_loopback)
            uid = own_row(at.db, hotkey)[0]
            at.db.execute("UPDATE neurons SET ip = ?, port = ? WHERE uid = ?", (ip, port, uid))
            return Receipt(Outcome.APPLIED, at.block)

    def submit_weights(
        self, hotkey: str, weights: Mapping[str, float], version_key: int, deadline: Deadline
    ) -> Receipt:
        """Store or seal a row; the checks come in the real chain's order. ``weights`` is already parsed."""
        with self._writing(deadline) as at:
            uid, last_update, permit, stake = own_row(at.db, hotkey)
            rules = at.rules
            if stake < rules.stake_threshold:
                raise LedgerError(Code.LOW_STAKE, f"stake {stake:g} is below {rules.stake_threshold:g}: add stake")
            if version_key < rules.version_key:
                raise LedgerError(Code.STALE_VERSION, f"version {version_key} is below {rules.version_key}: update")
            wait = last_update + rules.rate_limit - at.block
            if wait > 0:
                raise LedgerError(Code.RATE_LIMITED, "weights, or the registration, are too recent", wait)
            if not permit:
                raise LedgerError(Code.NO_PERMIT, "no validator permit; the next epoch may grant it to enough stake")
            uids = dict(at.db.execute("SELECT hotkey, uid FROM neurons").fetchall())
            kept, dropped = split_registered(weights, uids)
            row = to_u16(kept, rules.max_weight_share)
            check_row(row, rules, uid, set(uids.values()))
            if rules.commit_reveal:
                due = at.block // rules.tempo + rules.reveal_period
                at.db.execute("INSERT INTO commits (uid, epoch, weights) VALUES (?, ?, ?)", (uid, due, pack_row(row)))
            else:
                at.db.execute("UPDATE neurons SET weights = ? WHERE uid = ?", (pack_row(row), uid))
            at.db.execute("UPDATE neurons SET last_update = ? WHERE uid = ?", (at.block, uid))
            return Receipt(Outcome.COMMITTED if rules.commit_reveal else Outcome.APPLIED, at.block, dropped)

    def accept_nonce(self, hotkey: str, nonce_ns: int, now_ns: int, deadline: Deadline) -> bool:
        """Record a request's nonce for all server processes of this file; False if it was there."""
        keep_ns = int((MAX_AGE_S + MAX_SKEW_S) * 2e9)
        with self._store.transaction(deadline, write=True) as db:
            db.execute("DELETE FROM nonces WHERE expires < ?", (now_ns,))
            done = db.execute("INSERT OR IGNORE INTO nonces VALUES (?, ?, ?)", (hotkey, nonce_ns, now_ns + keep_ns))
            return done.rowcount == 1

    # What the operator does

    def set_stake(self, hotkey: str, stake: float, deadline: Deadline) -> None:
        self._set_account(hotkey, "stake", stake, deadline)

    def set_funds(self, hotkey: str, funds: float, deadline: Deadline) -> None:
        self._set_account(hotkey, "funds", funds, deadline)

    def change_rules(self, deadline: Deadline, **changes: object) -> Rules:
        """Replace some rules from the next block on; tempo and block_time_s are fixed for life."""
        if {"tempo", "block_time_s"} & set(changes):
            raise ValueError("tempo and block_time_s are fixed when the ledger is created")
        with self._writing(deadline) as at:
            rules = replace(at.rules, **changes)  # type: ignore[arg-type]
            at.db.execute("UPDATE chain SET rules = ?", (json.dumps(asdict(rules)),))
            return rules

    def advance(self, blocks: int, deadline: Deadline) -> int:
        """Make blocks at once, whatever the clock says; returns the current block."""
        left = blocks
        while left > 0:
            with self._store.transaction(deadline, write=True) as db:
                left -= self._tick(db, left)
        return self.clock(deadline)[0]

    def _set_account(self, hotkey: str, column: str, value: float, deadline: Deadline) -> None:
        _check_address(hotkey)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{column} must be a finite number that is not negative")
        with self._writing(deadline) as at:
            at.db.execute("INSERT INTO accounts (hotkey) VALUES (?) ON CONFLICT DO NOTHING", (hotkey,))
            at.db.execute(f"UPDATE accounts SET {column} = ? WHERE hotkey = ?", (value, hotkey))

    # Clock

    @contextmanager
    def _reading(self, deadline: Deadline) -> Iterator[_Moment]:
        while True:
            with self._store.transaction(deadline, write=False) as db:
                block, origin_s, rules = _state(db)
                if not self._due(block, origin_s, rules):
                    yield _Moment(db, block, rules)
                    return
            with self._store.transaction(deadline, write=True) as db:
                self._tick(db)

    @contextmanager
    def _writing(self, deadline: Deadline) -> Iterator[_Moment]:
        while True:
            with self._store.transaction(deadline, write=True) as db:
                if not self._tick(db):
                    block, _, rules = _state(db)
                    yield _Moment(db, block, rules)
                    return

    def _due(self, block: int, origin_s: float, rules: Rules) -> int:
        """Blocks whose time came and that nobody has made yet."""
        if not rules.block_time_s:
            return 0
        return max(0, 1 + int((self._now() - origin_s) / rules.block_time_s) - block)

    def _tick(self, db: sqlite3.Connection, most: int | None = None) -> int:
        """Make the blocks that are due, up to the next epoch and with it; returns how many."""
        block, origin_s, rules = _state(db)
        due = self._due(block, origin_s, rules) if most is None else most
        if most is None and due > IDLE_TEMPOS * rules.tempo:
            db.execute("UPDATE chain SET origin_s = ?", (self._now() - block * rules.block_time_s,))
            due = 1
        if due <= 0:
            return 0
        step = min(due, _next_epoch(block, rules) - block)
        last = block + step
        if most is not None:
            db.execute("UPDATE chain SET origin_s = origin_s - ?", (step * rules.block_time_s,))
        db.executemany("INSERT INTO blocks VALUES (?, ?)", [(n, _draw_hash()) for n in range(block + 1, last + 1)])
        db.execute("DELETE FROM blocks WHERE number <= ?", (last - KEPT_HASHES,))
        db.execute("UPDATE chain SET block = ?", (last,))
        if last % rules.tempo == 0:
            run_epoch(db, last, rules)
        return step


def _state(db: sqlite3.Connection) -> tuple[int, float, Rules]:
    block, origin_s, rules = db.execute("SELECT block, origin_s, rules FROM chain").fetchone()
    return block, origin_s, Rules(**json.loads(rules))


def _next_epoch(block: int, rules: Rules) -> int:
    return (block // rules.tempo + 1) * rules.tempo


def _draw_hash() -> str:
    return "0x" + os.urandom(32).hex()


def _check_address(hotkey: str) -> None:
    if not is_address(hotkey):
        raise ValueError(f"{hotkey!r} is not a hotkey address")
