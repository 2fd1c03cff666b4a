"""A whole economy on one machine: bootstrap server, ledger, miners of which some cheat, and validators."""

from hivetrain.demo.economy import run_demo
from hivetrain.demo.options import Options

__all__ = ["Options", "run_demo"]
