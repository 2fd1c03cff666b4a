import hashlib
import itertools

import pytest
from small_economy import TEMPO, Station, World


@pytest.fixture
def world(tmp_path, monkeypatch):
    numbers = itertools.count()  # the same draws in every run of a test
    monkeypatch.setattr(
        "hivetrain.chain.ledger._draw_hash", lambda: "0x" + hashlib.sha256(bytes([next(numbers) % 256])).hexdigest()
    )
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def station(world):
    """A validator that may set weights, in the chain's first block after an epoch."""
    made = Station(world, "validator")
    world.advance_to(TEMPO)
    yield made
    made.close()
