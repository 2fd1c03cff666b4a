"""Where a DHT node listens and whom it calls, checked before p2pd sees it.

The surprising fact: two p2pd listen on one port without complaint, so a port that is taken has to be found out here.
"""

import ipaddress
import socket
from collections.abc import Sequence

from hivetrain.errors import UserError
from hivetrain.swarm.addresses import parse_maddr


def parse_option(name: str, text: str, *, with_peer_id: bool = False) -> str:
    """A multiaddr that the user gave as option ``name``. Raises UserError if it is none."""
    try:
        return parse_maddr(text, with_peer_id=with_peer_id)
    except ValueError as error:
        raise UserError(f"{name}: {text!r}: {error}") from error


def refuse_taken_ports(hosts: Sequence[str]) -> None:
    """Raises UserError if one of these TCP multiaddrs cannot be listened on."""
    for host in hosts:
        _, family, address, *rest = host.split("/")
        if family not in ("ip4", "ip6") or len(rest) < 2 or rest[0] != "tcp" or rest[1] == "0":
            continue
        with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == "ip6":
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, int(rest[1])))
            except OSError as error:
                raise UserError(f"cannot listen on {host}: {error.strerror}") from error


def is_loopback(maddr: str) -> bool:
    """Whether only this machine can use the address."""
    _, family, address, *_ = maddr.split("/")
    return family in ("ip4", "ip6") and ipaddress.ip_address(address).is_loopback
