"""The swarm's DHT: find it, join it, and leave no process behind."""

from hivetrain.swarm.addresses import INITIAL_PEERS_ENV, SwarmJoinError, resolve_initial_peers
from hivetrain.swarm.dht import (
    DEFAULT_HOST_MADDRS,
    DHTUnavailableError,
    SwarmDHT,
    count_known_peers,
    run_in_dht,
    start_dht,
    visible_maddrs,
)
from hivetrain.swarm.processes import end_with_parent

__all__ = [
    "DEFAULT_HOST_MADDRS",
    "INITIAL_PEERS_ENV",
    "DHTUnavailableError",
    "SwarmDHT",
    "SwarmJoinError",
    "count_known_peers",
    "end_with_parent",
    "resolve_initial_peers",
    "run_in_dht",
    "start_dht",
    "visible_maddrs",
]
