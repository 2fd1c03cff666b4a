"""Starts a bootstrap's own DHT peer, which may be a relay.

Surprising fact: every p2pd offers to be a relay, but keeps the offer to itself until libp2p believes that the machine
can be reached from outside. It finds that out by asking strangers; a relay that an operator wants is told.
"""

import os
from collections.abc import Sequence

from hivemind.dht.crypto import RSASignatureValidator

from hivetrain.swarm import SwarmDHT, SwarmJoinError, start_dht
from hivetrain.swarm.addresses import parse_maddr
from hivetrain.swarm.records import HotkeyRecords

START_TIMEOUT_S = 60.0


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
    """
    probe = start_dht(
        [],
        host_maddrs=host_maddrs,
        announce_maddrs=announce_maddrs,
        identity_path=identity_path,
        record_validators=(validator,),
    )
    if not relay:
        return probe
    probe.shutdown()  # it has checked addresses, port and identity
    dht = SwarmDHT(
        start=False,
        host_maddrs=[parse_maddr(maddr, with_peer_id=False) for maddr in host_maddrs],
        announce_maddrs=list(announce_maddrs) if announce_maddrs else None,
        identity_path=None if identity_path is None else os.fspath(identity_path),
        record_validators=(validator, HotkeyRecords()),
        startup_timeout=START_TIMEOUT_S,
        force_reachability="public",
    )
    try:
        dht.run_in_background(timeout=START_TIMEOUT_S)
    except BaseException as error:
        dht.shutdown()
        if isinstance(error, Exception):
            raise SwarmJoinError(f"cannot start a relay: {error or type(error).__name__}") from error
        raise
    return dht
