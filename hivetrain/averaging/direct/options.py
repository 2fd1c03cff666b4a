"""How a peer takes part in direct links, decided before it has an event loop."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from hivemind.p2p import PeerID

from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.direct.contact import MAX_ADDRESSES, Address, Contact
from hivetrain.averaging.direct.handshake import Credentials
from hivetrain.averaging.direct.paths import Paths
from hivetrain.averaging.libp2p import RoundService
from hivetrain.averaging.round import RoundTable
from hivetrain.swarm.identity import Identity

TRANSPORTS = ("auto", "libp2p", "direct", "direct-plain")


@dataclass(frozen=True)
class DirectOptions:
    """Direct links of one peer.

    Attributes:
        transport: ``auto`` (TLS where possible, else libp2p), ``direct`` (TLS or the round fails) or ``direct-plain``
            (neither encrypted nor authenticated, or the round fails).
        peer_id: own id.
        identity: the key behind it; not needed for plain links.
        maddrs: where this peer is announced; links are dialled at the same addresses.
        hosts: maddrs to listen on.
        port: TCP port to listen on; 0 picks a free one.
    """

    transport: str
    peer_id: PeerID
    identity: Identity | None
    maddrs: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    port: int = 0

    def open(
        self, run_id: str, service: RoundService, rounds: RoundTable, part_timeout_s: float,
        bucket: TokenBucket | None, client_mode: bool,
    ) -> Paths:  # fmt: skip
        """Begins to listen. Call it inside a running event loop.

        Raises:
            OSError: the port is taken.
        """
        mode = "direct-plain" if self.transport == "direct-plain" else "direct"
        credentials = Credentials(self.peer_id, None if mode == "direct-plain" else self.identity)
        is_required = self.transport != "auto"
        addresses = tuple(dict.fromkeys(addresses_of(self.maddrs)))[:MAX_ADDRESSES]
        contact = Contact(mode, addresses=addresses)
        paths = Paths(contact, is_required, credentials, run_id, service, rounds, part_timeout_s, bucket)
        if not client_mode:
            paths.listen([str(address) for address in addresses_of(self.hosts)], self.port)
        return paths


def addresses_of(maddrs: Sequence[str]) -> list[Address]:
    """The IP addresses of multiaddrs that lead to a peer without a relay."""
    found = []
    for maddr in maddrs:
        _, family, address, *rest = maddr.split("/")
        if family in ("ip4", "ip6") and "p2p-circuit" not in rest:
            found.append(ipaddress.ip_address(address))
    return found
