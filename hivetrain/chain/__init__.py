"""The incentive chain: one small interface over a laptop ledger, the same ledger served over HTTP, and Bittensor.

Names resolve on first use: importing this package loads no client of any chain.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "BittensorChain": "hivetrain.chain.bittensor",
    "Chain": "hivetrain.chain.base",
    "Code": "hivetrain.chain.base",
    "LedgerError": "hivetrain.chain.base",
    "LocalChain": "hivetrain.chain.local",
    "Neuron": "hivetrain.chain.base",
    "Outcome": "hivetrain.chain.base",
    "Receipt": "hivetrain.chain.base",
    "RemoteChain": "hivetrain.chain.remote",
    "Rules": "hivetrain.chain.base",
    "Snapshot": "hivetrain.chain.base",
    "open_chain": "hivetrain.chain.address",
}
__all__ = [
    "BittensorChain",
    "Chain",
    "Code",
    "LedgerError",
    "LocalChain",
    "Neuron",
    "Outcome",
    "Receipt",
    "RemoteChain",
    "Rules",
    "Snapshot",
    "open_chain",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hivetrain.chain' has no attribute {name!r}")
