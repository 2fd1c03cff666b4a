"""Records of small made-up work, shared by the tests of this folder."""

import pytest
import torch

from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import Contribution, Position
from hivetrain.contribution.rules import AuditRules
from hivetrain.keys import Hotkey


def log_of(microbatches: int, batch_size: int = 8, seed: int = 0) -> WorkLog:
    """Consecutive microbatches with random sketches, beginning at block 3 of a unit."""
    generator = torch.Generator().manual_seed(seed)
    log = WorkLog()
    for index in range(microbatches):
        place = Position(0, 2, 1, 3 + index * batch_size)
        log.add(place, 1000 + index * batch_size, batch_size, 3.5 - index / 100, torch.randn(256, generator=generator))
    return log


def contribution_of(log: WorkLog, hotkey: Hotkey, **changes: object) -> Contribution:
    fields = {
        "run_id": "run-1",
        "hotkey": hotkey.address,
        "peer_id": "12D3KooWPeer",
        "swarm_epoch": 7,
        "params_digest": "0123456789abcdef" * 4,
        "rules": AuditRules(),
        "block": 1234,
        "precision": "32-true",
    }
    return log.contribution(**fields | changes)


@pytest.fixture
def hotkey() -> Hotkey:
    return Hotkey.from_seed(b"\x07" * 32)


@pytest.fixture
def stranger() -> Hotkey:
    return Hotkey.from_seed(b"\x08" * 32)


@pytest.fixture
def make_log():
    return log_of


@pytest.fixture
def make_contribution():
    return contribution_of
