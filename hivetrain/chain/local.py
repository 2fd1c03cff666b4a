"""LocalChain: one hotkey's view of a ledger file on this host.

Surprising fact: no signature is checked here. Whoever may write the file owns the ledger; hotkeys that should not trust
each other that far use the same ledger over HTTP (see remote.py).
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from hivetrain.chain.base import Chain, Code, Deadline, LedgerError, Receipt, Snapshot, Weights
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.weights import parse_weights
from hivetrain.keys import Hotkey, Wallet

POLL_S = 0.02


class LocalChain(Chain):
    """A chain in one SQLite file, shared by the processes of one host.

    Args:
        path: file made by ``hivetrain ledger create`` or :meth:`Ledger.create`.
        hotkey: who acts: an address, a key or a wallet.
        now: seconds since 1970; drives the blocks.
    """

    def __init__(self, path: str | Path, hotkey: str | Hotkey | Wallet, now: Callable[[], float] = time.time) -> None:
        self._ledger = Ledger(path, now)
        self._who = hotkey
        self._closed = threading.Event()

    @property
    def hotkey(self) -> str:
        if isinstance(self._who, Wallet):
            self._who = self._who.address()
        return self._who.address if isinstance(self._who, Hotkey) else self._who

    def snapshot(self, timeout_s: float) -> Snapshot:
        return self._ledger.snapshot(_deadline(timeout_s))

    def register(self, timeout_s: float) -> Receipt:
        return self._ledger.register(self.hotkey, _deadline(timeout_s))

    def publish(self, ip: str, port: int, timeout_s: float) -> Receipt:
        return self._ledger.publish(self.hotkey, ip, port, _deadline(timeout_s))

    def submit_weights(self, weights: Weights, version_key: int, timeout_s: float) -> Receipt:
        return self._ledger.submit_weights(self.hotkey, parse_weights(weights), version_key, _deadline(timeout_s))

    def wait_block(self, block: int, timeout_s: float) -> int:
        deadline = _deadline(timeout_s)
        while True:
            # Reading the clock gets a second of its own, so that a short wait still learns the current block.
            current, next_s = self._ledger.clock(_deadline(deadline.left_s() + 1))
            if current >= block or deadline.left_s() <= 0:
                return current
            if self._closed.wait(min(deadline.left_s(), POLL_S if next_s is None else next_s + 0.001)):
                raise LedgerError(Code.CLOSED, "this chain was closed")

    def block_hash(self, block: int, timeout_s: float) -> str | None:
        return self._ledger.block_hash(block, _deadline(timeout_s))

    def weights(self, timeout_s: float) -> dict[str, dict[str, float]]:
        return self._ledger.weights(_deadline(timeout_s))

    def close(self) -> None:
        self._closed.set()
        self._ledger.close()


def _deadline(timeout_s: float) -> Deadline:
    return Deadline(timeout_s, time.monotonic)
