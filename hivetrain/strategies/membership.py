"""A fit's membership in a swarm: the DHT node and the peer on top of it, opened together and closed together."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.averaging.codecs import Codec
from hivetrain.averaging.direct.options import DirectOptions
from hivetrain.averaging.held import HeldState
from hivetrain.averaging.options import PeerOptions
from hivetrain.averaging.peer import SwarmPeer
from hivetrain.averaging.settings import RunSettings
from hivetrain.swarm import SwarmDHT, resolve_initial_peers, start_dht, visible_maddrs
from hivetrain.swarm.dht import DEFAULT_HOST_MADDRS
from hivetrain.swarm.identity import Identity, identity_file, load_identity

logger = logging.getLogger(__name__)


class Membership:
    """Joins a swarm through its DHT.

    Args:
        initial_peers: where to join; see :func:`hivetrain.swarm.resolve_initial_peers`.
        timeout_s: limit for finding and joining the swarm.
        options: how this peer takes part.
        dht_options: further arguments of :func:`hivetrain.swarm.start_dht`.
        transport: which links to use in exchanges; see ``direct.options.DirectOptions``.
        direct_port: TCP port for direct links; 0 picks a free one.
    """

    def __init__(
        self, initial_peers: list[str] | str | None, timeout_s: float, options: PeerOptions,
        dht_options: dict[str, Any], transport: str = "libp2p", direct_port: int = 0,
    ) -> None:  # fmt: skip
        self._initial_peers, self._timeout_s = initial_peers, timeout_s
        self._options, self._dht_options = options, dht_options
        self._transport, self._direct_port = transport, direct_port
        self.dht: SwarmDHT | None = None
        self.peer: SwarmPeer | None = None
        self.maddrs: list[str] = []

    def open(
        self,
        settings: RunSettings,
        codec: Codec,
        held: HeldState,
        give_up: Callable[[], bool],
    ) -> None:
        """Joins; what was opened before a failure is closed by :meth:`close`.

        Args:
            settings: what all peers of the run have in common.
            codec: of the run's compressor.
            held: the state to serve to others.
            give_up: asked several times a second during every wait.

        Raises:
            SwarmJoinError: nobody could be reached.
            SettingsMismatch: the run has other settings.
        """
        peers = resolve_initial_peers(self._initial_peers, timeout_s=self._timeout_s)
        validator = RSASignatureValidator(RSAPrivateKey())  # not the process-wide key: a process may hold several peers
        with identity_file(self._dht_options.get("identity_path")) as path:
            self.dht = start_dht(
                peers,
                client_mode=self._options.client_mode,
                startup_timeout_s=self._timeout_s,
                record_validators=(validator,),
                **(self._dht_options | {"identity_path": path}),
            )
            identity = load_identity(path)
        self.maddrs = visible_maddrs(self.dht)
        options = replace(self._options, direct=self._direct(identity))
        self.peer = SwarmPeer(self.dht, validator.local_public_key, settings, options, codec, held)
        self.peer.open(give_up)
        where = ", ".join(self.maddrs)
        logger.info("peer %s joined run %r; reachable at %s", self.peer.peer_id, self._options.run_id, where)

    def close(self) -> None:
        """Leaves; takes a few seconds at most and may be called at any moment."""
        if self.peer is not None:
            self.peer.close()
            self.peer = None
        if self.dht is not None:
            self.dht.shutdown()
            self.dht = None

    def _direct(self, identity: Identity) -> DirectOptions | None:
        if self._transport == "libp2p":
            return None
        hosts = tuple(self._dht_options.get("host_maddrs", DEFAULT_HOST_MADDRS))
        return DirectOptions(self._transport, identity.peer_id, identity, tuple(self.maddrs), hosts, self._direct_port)
