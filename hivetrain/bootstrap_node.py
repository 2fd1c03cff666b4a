"""Starts a bootstrap's own DHT peer, which may be a relay.

Surprising fact: every p2pd offers to be a relay, but keeps the offer to itself until libp2p believes that the machine
can be reached from outside. It finds that out by asking strangers; a relay that an operator wants is told.
"""

import os
from collections.abc import Sequence

from hivemind.dht.crypto import RSASignatureValidator

from hivetrain.swarm import SwarmDHT, start_dht


def start_node(
    host_maddrs: Sequence[str],
    announce_maddrs: Sequence[str] | None,
    identity_path: str | os.PathLike[str] | None,
    *,
    relay: bool,
    validator: RSASignatureValidator,
) -> SwarmDHT:
    """A DHT peer that belongs to no swarm yet. The caller shuts it down.

    Raises:
        UserError: an address, a port or the identity file is unusable.
        SwarmJoinError: it does not start.
    """
    return start_dht(
        [],
        host_maddrs=host_maddrs,
        announce_maddrs=announce_maddrs,
        identity_path=identity_path,
        record_validators=(validator,),
        force_reachability="public" if relay else None,
    )
