"""Where a peer can be dialled, as its offer tells the group."""

import ipaddress
from dataclasses import dataclass

MAX_ADDRESSES = 3
MAX_CONTACT_BYTES = 64
MODES = {1: "direct", 2: "direct-plain"}
_CODES = {mode: code for code, mode in MODES.items()}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Contact:
    """How a peer takes part in direct links.

    Attributes:
        mode: ``direct`` (TLS) or ``direct-plain``; only peers of one mode link.
        rate: sending speed that it measured, or its limit, as round(4 * log2(bytes per second)); 0 for unknown.
        port: TCP port; 0 if it cannot be dialled.
        addresses: at most 3.
    """

    mode: str
    rate: int = 0
    port: int = 0
    addresses: tuple[Address, ...] = ()

    @property
    def places(self) -> tuple[int, tuple[Address, ...]]:
        """Where to dial it."""
        return self.port, self.addresses

    def to_bytes(self) -> bytes:
        packed = b"".join(bytes([len(address.packed)]) + address.packed for address in self.addresses)
        return bytes([_CODES[self.mode], self.rate]) + self.port.to_bytes(2) + packed

    @classmethod
    def from_bytes(cls, data: bytes) -> "Contact":
        """Parses a contact. Raises ValueError on anything that is not one."""
        if not 4 <= len(data) <= MAX_CONTACT_BYTES or data[0] not in MODES:
            raise ValueError("not a contact")
        addresses: list[Address] = []
        rest = data[4:]
        while rest:
            size, packed, rest = rest[0], rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
            if size not in (4, 16) or len(packed) != size or len(addresses) == MAX_ADDRESSES:
                raise ValueError("a contact's addresses are malformed")
            addresses.append(ipaddress.ip_address(packed))
        return cls(MODES[data[0]], data[1], int.from_bytes(data[2:4]), tuple(addresses))

    def dialable(self, own: "Contact") -> list[tuple[str, int]]:
        """Where to dial this peer from a peer of contact ``own``; loopback only between peers on loopback."""
        if not self.port:
            return []
        on_loopback = any(address.is_loopback for address in own.addresses)
        return [
            (str(address), self.port)
            for address in self.addresses
            if not (address.is_multicast or address.is_unspecified or (address.is_loopback and not on_loopback))
        ]
