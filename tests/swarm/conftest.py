"""A run for each test, and a DHT node for each module."""

import pytest
from peers import Swarm

from hivetrain.swarm import start_dht, visible_maddrs


@pytest.fixture(scope="module")
def bootstrap():
    """Addresses of a DHT node that all tests of a module join through."""
    dht = start_dht([])
    yield ",".join(visible_maddrs(dht))
    dht.shutdown()


@pytest.fixture
def swarm(request, tmp_path, bootstrap):
    swarm = Swarm(tmp_path, request.node.name.split("[")[0].replace(".", "_"), bootstrap)
    yield swarm
    swarm.close()
