"""Prometheus metrics of the programs: what each exposes, and the server that exposes it."""

from hivetrain.metrics.bootstrap import BootstrapMetrics, BootstrapState
from hivetrain.metrics.dashboard import DashboardMetrics
from hivetrain.metrics.miner import MinerMetrics, MinerState
from hivetrain.metrics.requests import CountedRequests, request_histogram
from hivetrain.metrics.server import MetricsServer, new_registry
from hivetrain.metrics.validator import ValidatorMetrics

__all__ = [
    "BootstrapMetrics",
    "BootstrapState",
    "CountedRequests",
    "DashboardMetrics",
    "MetricsServer",
    "MinerMetrics",
    "MinerState",
    "ValidatorMetrics",
    "new_registry",
    "request_histogram",
]
