"""What one attempt at a global update really did.

An attempt is a success only if every member of a quorate group holds the same bytes (``AVERAGED``), or if no other
peer was alive to average with (``ALONE``). Everything else leaves params, optimizer and gradients untouched.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How an attempt ended. ``UNKNOWN`` is its own state: the others may or may not have committed."""

    AVERAGED = "averaged"
    ALONE = "alone"
    LOCAL = "local"
    NO_GROUP = "no_group"
    BELOW_QUORUM = "below_quorum"
    EXCLUDED = "excluded"
    INCOMPLETE = "incomplete"
    DISAGREED = "disagreed"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Member:
    """Who took part in a round, and with what.

    Attributes:
        peer_id: libp2p identity, base58.
        samples: samples that it says are behind its gradient.
        weight: what they counted for in the average.
        commitment: what it bound itself to before the exchange; b"" for nothing.
    """

    peer_id: str
    samples: int
    weight: float
    commitment: bytes = b""


@dataclass(frozen=True)
class RoundReport:
    """One attempt to turn the swarm's gradients into one global update.

    Attributes:
        swarm_epoch: the epoch that the attempt wanted to finish (0 before the first global update).
        outcome: see :class:`Outcome`.
        group_size: members that exchanged with each other, this peer included; 1 if none did.
        expected_peers: live peers of the run at that epoch, this peer included, when the attempt began.
        fraction: share of the averaged vector's elements received, 0 to 1. Below 1 nothing is committed.
        samples: samples in the committed average, over all members, before the cap; 0 if nothing was committed.
        local_samples: samples of this peer that the attempt was made with.
        matchmaking_s: seconds from the start of the attempt until a group was found or given up.
        exchange_s: seconds of exchange and vote.
        bytes_sent: payload bytes sent to other members.
        bytes_received: payload bytes received from other members.
        reason: one sentence for people; empty on success.
        members: whose gradients are in the committed average; empty if nothing was committed.
        links: which way the exchange took to each other member, by peer id: ``direct``, ``direct-plain``, ``libp2p``,
            or ``none`` if that was not known when it failed.
        blamed: peers by whose fault, as this peer saw it itself, the exchange failed.
    """

    swarm_epoch: int
    outcome: Outcome
    group_size: int = 1
    expected_peers: int = 1
    fraction: float = 0.0
    samples: int = 0
    local_samples: int = 0
    matchmaking_s: float = 0.0
    exchange_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    reason: str = ""
    members: tuple[Member, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    blamed: tuple[str, ...] = ()

    @property
    def committed(self) -> bool:
        """Whether the attempt led to a global update on this peer."""
        return self.outcome in (Outcome.AVERAGED, Outcome.ALONE, Outcome.LOCAL)

    def metrics(self) -> dict[str, float]:
        """The report as metrics, by the names under which loggers get them."""
        return {
            "swarm/epoch": self.swarm_epoch,
            "swarm/group_size": self.group_size,
            "swarm/expected_peers": self.expected_peers,
            "swarm/fraction_received": self.fraction,
            "swarm/samples": self.samples,
            "swarm/local_samples": self.local_samples,
            "swarm/matchmaking_s": self.matchmaking_s,
            "swarm/exchange_s": self.exchange_s,
            "swarm/bytes_sent": self.bytes_sent,
            "swarm/bytes_received": self.bytes_received,
            "swarm/direct_links": sum(way.startswith("direct") for way in self.links.values()),
            "swarm/committed": float(self.committed),
        }

    def __str__(self) -> str:
        line = (
            f"swarm epoch {self.swarm_epoch}: {self.outcome}, group {self.group_size} of {self.expected_peers}, "
            f"{self.fraction:.0%} received, {self.samples} samples ({self.local_samples} own), "
            f"matchmaking {self.matchmaking_s:.2f} s, exchange {self.exchange_s:.2f} s, "
            f"{self.bytes_sent / 1e6:.2f} MB up, {self.bytes_received / 1e6:.2f} MB down"
        )
        return f"{line}: {self.reason}" if self.reason else line
