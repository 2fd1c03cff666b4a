"""Peers by whose fault, as this peer saw it itself, a round failed: left out for a while of the groups formed here.

Blame is never passed on: what others say of a peer is hearsay, and a lie costs nothing. An accusation only makes this
peer wait, to see by its own clock whether the accused is late. So a peer can keep another out of groups that it leads
or asks to join, and out of no others. It is counted in rounds, not seconds: an honest peer that
was slow once loses a few updates, whether an update takes a second or an hour.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

_FIRST_ROUNDS = 2
_MAX_FAULTS = 6
_ATONING = 10  # rounds together that make up for one fault


@dataclass
class _Record:
    faults: int = 0
    out_until: int = 0
    good_rounds: int = 0


class Blame:
    """Remembers faults: a first one counts for two rounds, and each that follows for twice as many, up to 64.

    Ten rounds together make up for one fault, so that nobody can spoil every other round.
    """

    def __init__(self) -> None:
        self._round = 0
        self._records: dict[str, _Record] = {}

    def add(self, peer_id: str) -> None:
        """A round failed by this peer's fault."""
        record = self._records.setdefault(peer_id, _Record())
        record.faults, record.good_rounds = min(_MAX_FAULTS, record.faults + 1), 0
        record.out_until = self._round + _FIRST_ROUNDS * 2 ** (record.faults - 1)

    def atone(self, peer_ids: Iterable[str]) -> None:
        """A round with these peers succeeded."""
        for peer_id in peer_ids:
            record = self._records.get(peer_id)
            if record is None:
                continue
            record.out_until, record.good_rounds = 0, record.good_rounds + 1
            if record.good_rounds == _ATONING:
                record.faults, record.good_rounds = record.faults - 1, 0
                if not record.faults:
                    del self._records[peer_id]

    def next_round(self, live: Collection[str], quorum: int) -> frozenset[str]:
        """Begins a round; which of the ``live`` peers to leave out of it: nobody, if the others were no quorum then."""
        self._round += 1
        blamed = frozenset(
            peer_id for peer_id in live if peer_id in self._records and self._records[peer_id].out_until >= self._round
        )
        return blamed if len(live) - len(blamed) >= quorum else frozenset()
