"""The main job on one machine: a bootstrap server and miners that train one model together."""

from hivetrain.demo.economy import Options, run_demo

__all__ = ["Options", "run_demo"]
