"""What a run shows, keeps and reports: each a Lightning callback that any strategy may use."""

from hivetrain.callbacks.checkpoint import SwarmCheckpoint
from hivetrain.callbacks.contribution import ContributionPublisher
from hivetrain.callbacks.energy import EnergyUse
from hivetrain.callbacks.metrics import SwarmMetrics
from hivetrain.callbacks.progress import SwarmProgress
from hivetrain.callbacks.report import MinerReport
from hivetrain.callbacks.sample import GenerationSample
from hivetrain.callbacks.status import SwarmStatus
from hivetrain.callbacks.stop import StopAtSwarmEpoch

__all__ = [
    "ContributionPublisher",
    "EnergyUse",
    "GenerationSample",
    "MinerReport",
    "StopAtSwarmEpoch",
    "SwarmCheckpoint",
    "SwarmMetrics",
    "SwarmProgress",
    "SwarmStatus",
]
