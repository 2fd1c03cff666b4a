"""A run for each test, and a DHT node for each module."""

import re
from contextlib import closing

import pytest
from peers import Swarm

from hivetrain.swarm import start_dht, visible_maddrs


@pytest.fixture(scope="module")
def bootstrap():
    """Addresses of a DHT node that all tests of a module join through."""
    dht = start_dht([])
    yield ",".join(visible_maddrs(dht))
    dht.shutdown()


@pytest.fixture(params=["direct", pytest.param("libp2p", marks=pytest.mark.slow)])
def transport(request):
    """How the peers of a test exchange gradients; see ``peers.over_both`` for tests that use both by default."""
    return request.param


@pytest.fixture
def swarm(request, tmp_path, bootstrap, transport):
    with closing(Swarm(tmp_path, run_id_of(request), bootstrap, transport)) as swarm:
        yield swarm


@pytest.fixture
def secluded_swarm(request, tmp_path, transport):
    """A run in a DHT of its own, for tests that stop peers.

    Reading a DHT takes seconds for each node that is gone, while p2pd asks a stopped one where it might be: with those
    that other tests left, longer than a record lives.
    """
    dht = start_dht([])
    try:
        with closing(Swarm(tmp_path, run_id_of(request), ",".join(visible_maddrs(dht)), transport)) as swarm:
            yield swarm
    finally:
        dht.shutdown()


def run_id_of(request):
    """The test's name, with its parameters, as a run may be called."""
    return re.sub(r"\W", "_", request.node.name)
