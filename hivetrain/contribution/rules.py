"""The rules of audits, which all miners and validators of a run must share.

Surprising fact: every record carries the fingerprint of its miner's rules, so a miner with other rules is told apart
from one that cheats.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import msgpack

MAX_LEAVES = 8
_DOMAIN = b"hivetrain/contribution/1/rules"


@dataclass(frozen=True)
class AuditRules:
    """How often a contribution is audited, how thoroughly, and in which blocks.

    Args:
        probability: share of contributions that are audited.
        leaves: microbatches that an audit looks at.
        beacon_lag: blocks between the commitment and the block whose hash draws the audits. The members of a round may
            commit half as many blocks apart; the other half should last longer than an exchange.
        reveal_blocks: blocks after that one in which a drawn miner may still reveal.
    """

    probability: float = 0.25
    leaves: int = 2
    beacon_lag: int = 30
    reveal_blocks: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie between 0 and 1, got {self.probability}")
        if not 1 <= self.leaves <= MAX_LEAVES:
            raise ValueError(f"leaves must lie between 1 and {MAX_LEAVES}, got {self.leaves}: a reveal holds no more")
        if not 1 <= self.beacon_lag < 2**16 or not 1 <= self.reveal_blocks < 2**16:
            raise ValueError("beacon_lag and reveal_blocks must lie between 1 and 65535 blocks")

    @property
    def spread(self) -> int:
        """Blocks by which a member may have committed before the last one of its round."""
        return self.beacon_lag // 2

    @property
    def blind_blocks(self) -> int:
        """Blocks for which nobody in a round can know a beacon, from the last commitment on."""
        return self.beacon_lag - self.spread

    @property
    def threshold(self) -> int:
        """``probability`` as the number of 64-bit draws, of 2**64, that mean an audit; exact on every machine."""
        return int(Fraction(self.probability) * 2**64)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that name these rules and this version of the records and the sketch."""
        fields = [self.threshold.to_bytes(9, "big"), self.leaves, self.beacon_lag, self.reveal_blocks]
        return hashlib.sha256(_DOMAIN + msgpack.packb(fields)).digest()[:16]
