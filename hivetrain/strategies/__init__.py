"""Lightning strategies."""

from hivetrain.strategies.hivemind import HivemindStrategy

__all__ = ["HivemindStrategy"]
