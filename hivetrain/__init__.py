"""hivetrain: collaborative training in Lightning, paid by proven work.

Importing it loads nothing heavy: public names resolve on first use, and the strategy alias ``"hivemind"`` is
registered the moment Lightning is imported, whichever of the two comes first.
"""

from importlib import import_module
from typing import Any

import wrapt

_PUBLIC = {
    "CausalLM": "hivetrain.model",
    "HivemindStrategy": "hivetrain.strategies",
    "RefinedWebDataModule": "hivetrain.data",
}
__all__ = ["CausalLM", "HivemindStrategy", "RefinedWebDataModule"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hivetrain' has no attribute {name!r}")


def _hivemind_strategy(**init_args: Any) -> Any:
    return __getattr__("HivemindStrategy")(**init_args)


@wrapt.when_imported("lightning.pytorch")
def _register_strategies(_lightning: Any) -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    if "hivemind" not in StrategyRegistry:
        StrategyRegistry.register("hivemind", _hivemind_strategy, description="Collaborative training over hivemind")
