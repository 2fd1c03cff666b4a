"""The demo's incentive network: a ledger, throw-away keys, registrations and stake, as an operator sets them up."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hivetrain.chain.base import Deadline, Rules, Snapshot
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.keys import Wallet

WALLET = "demo"
BLOCK_TIME_S = 1.0
# A tempo is some ten updates long here. Nothing may serve on loopback on a real network.
RULES = Rules(
    tempo=20,
    block_time_s=BLOCK_TIME_S,
    rate_limit=5,
    activity_cutoff=10_000,
    stake_threshold=1.0,
    allow_loopback=True,
)
_TIMEOUT_S = 30.0


class Subnet:
    """A new subnet below ``directory``; whatever lay there from an earlier one is removed.

    Args:
        directory: for the ledger's file and the wallets.
    """

    def __init__(self, directory: Path) -> None:
        self.file = directory / "ledger.db"
        self.wallets = directory / "wallets"
        self.hotkeys: dict[str, str] = {}

    def create(self, miners: Sequence[str], validators: Sequence[str]) -> None:
        """Registers miners and then validators, in this order by uid, and lets a tempo pass: permits come with it."""
        shutil.rmtree(self.file.parent, ignore_errors=True)
        self.file.parent.mkdir(parents=True)
        Ledger.create(self.file, RULES)
        ledger = Ledger(self.file)
        for name in (*miners, *validators):
            hotkey = Wallet(WALLET, name, str(self.wallets)).create_hotkey()
            self.hotkeys[name] = hotkey.address
            if name in validators:
                ledger.set_stake(hotkey.address, 100.0, _deadline())
            with LocalChain(self.file, hotkey) as chain:
                chain.register(_TIMEOUT_S)
        ledger.advance(RULES.tempo, _deadline())
        ledger.close()

    def key_arguments(self, name: str) -> dict[str, Any]:
        """Names the wallet of a miner or validator."""
        return {"wallet": WALLET, "hotkey": name, "wallet_path": self.wallets}

    def state_file(self, validator: str) -> Path:
        """Where a validator keeps its state."""
        return self.file.parent / f"{validator}.db"

    def forget_params(self) -> None:
        """Removes what validators have kept of the last epochs: hundreds of megabytes."""
        for kept in self.file.parent.glob("*.epochs"):
            shutil.rmtree(kept, ignore_errors=True)

    def snapshot(self) -> Snapshot:
        """The subnet now."""
        ledger = Ledger(self.file)
        try:
            return ledger.snapshot(_deadline())
        finally:
            ledger.close()

    def earnings(self) -> dict[str, float]:
        """All that each hotkey ever earned."""
        ledger = Ledger(self.file)
        try:
            return ledger.earnings(_deadline())
        finally:
            ledger.close()

    def weights(self) -> dict[str, dict[str, float]]:
        """Each validator's last weights: validator to miner to share."""
        with LocalChain(self.file, next(iter(self.hotkeys.values()))) as chain:
            return chain.weights(_TIMEOUT_S)


def _deadline() -> Deadline:
    return Deadline(_TIMEOUT_S, time.monotonic)
