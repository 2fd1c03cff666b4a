"""Who is in the run, who came, who left, and who was lost.

Surprising fact: a reading of the DHT may be incomplete, so nobody is missed before its own record has expired. A peer
that ends in order takes its record back and has left; one whose record just expires was lost.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from hivetrain.averaging.progress import Progress, SwarmView
from hivetrain.monitor.reader import Reading
from hivetrain.monitor.status import Status

MAX_MEMBERS = 6000  # with those that are gone; a flood of made-up peers ends here
KEPT_S = 24 * 3600.0  # how long somebody who is gone stays in the table at most
_MAX_TOLD = 50  # events of one kind that a single reading may add


class Presence(StrEnum):
    """Where a peer is."""

    LIVE = "live"
    LEFT = "left"  # in order
    LOST = "lost"  # without a word


@dataclass(frozen=True)
class Event:
    """Something that people want to be told of."""

    at: float
    kind: str
    peer_id: str
    text: str


@dataclass(frozen=True)
class Member:
    """One peer as far as it is known.

    Attributes:
        peer_id: libp2p identity, as it says.
        owner: the DHT subkey that only it can write; b"" if known from an earlier time only.
        presence: where it is.
        first_seen: seconds since 1970.
        last_seen: when its record was last found.
        expires: until when it counts as alive if no more is heard.
        progress: its progress record; None if known from an earlier time only.
        status: its status record, if it publishes one.
    """

    peer_id: str
    owner: bytes
    presence: Presence
    first_seen: float
    last_seen: float
    expires: float = 0.0
    progress: Progress | None = None
    status: Status | None = None


class Roster:
    """The peers of a run over time.

    Args:
        known: members of an earlier time; those that were live then are missed if they do not show up.
        wait_s: how long they have for it.

    Attributes:
        refused: records of the last reading that are none, or under somebody else's name.
        left_out: live peers of the last reading for whom there was no room.
    """

    def __init__(self, known: Iterable[Member] = (), wait_s: float = 10.0) -> None:
        self._members = {member.peer_id: member for member in known}
        self._wait_s = wait_s
        self._is_first = True
        self.refused = self.left_out = 0

    @property
    def members(self) -> list[Member]:
        """All of them, also those that are gone."""
        return list(self._members.values())

    @property
    def live(self) -> list[Member]:
        """Those who are here."""
        return [member for member in self._members.values() if member.presence is Presence.LIVE]

    def update(self, reading: Reading) -> list[Event]:
        """Takes a reading in; returns who came and who went."""
        events: list[Event] = []
        self.refused, self.left_out = reading.refused, 0
        if self._is_first:
            self._wait_for_the_known(reading.at)
        self._make_room(reading)
        for owner, sighting in reading.alive.items():
            self._see(owner, sighting.progress, sighting.expires, reading, events)
        for member in self.live:
            if member.owner and member.owner in reading.left:
                self._end(member, Presence.LEFT, reading.at, events)
            elif member.expires <= reading.at:
                self._end(member, Presence.LOST, reading.at, events)
        self._forget(reading.at)
        self._is_first = False
        return limited(events)

    def view(self) -> SwarmView:
        """The run as its live peers tell it, by the settings that most of them have."""
        records = [member.progress for member in self.live if member.progress is not None]
        votes = Counter(record.fingerprint for record in records)
        fingerprint = min(votes, key=lambda name: (-votes[name], name), default=b"")
        return SwarmView.of(records, fingerprint, 2**53)

    def _wait_for_the_known(self, at: float) -> None:
        for member in self.live:
            self._members[member.peer_id] = replace(member, expires=at + self._wait_s)

    def _make_room(self, reading: Reading) -> None:
        """Drops those who have been gone for longest where newcomers need their places; nobody who is live."""
        here = {sighting.progress.peer_id for sighting in reading.alive.values()}
        excess = len(here.union(self._members)) - MAX_MEMBERS
        if excess > 0:
            gone = [m for m in self.members if m.presence is not Presence.LIVE and m.peer_id not in here]
            for member in sorted(gone, key=lambda m: m.last_seen)[:excess]:
                del self._members[member.peer_id]

    def _see(self, owner: bytes, progress: Progress, expires: float, reading: Reading, events: list[Event]) -> None:
        known = self._members.get(progress.peer_id)
        if known is not None and known.owner not in (b"", owner) and known.presence is Presence.LIVE:
            self.refused += 1  # somebody else's name
            return
        if known is None and len(self._members) >= MAX_MEMBERS:
            self.left_out += 1
            return
        status = reading.statuses.get(owner, known.status if known is not None else None)
        first_seen = known.first_seen if known is not None else reading.at
        self._members[progress.peer_id] = Member(
            progress.peer_id, owner, Presence.LIVE, first_seen, reading.at, expires, progress, status
        )
        if known is None and self._is_first:
            events.append(Event(reading.at, "present", progress.peer_id, "was here when the dashboard began"))
        elif known is None:
            events.append(Event(reading.at, "joined", progress.peer_id, "joined the run"))
        elif known.presence is not Presence.LIVE:
            events.append(Event(reading.at, "returned", progress.peer_id, "came back"))

    def _end(self, member: Member, presence: Presence, at: float, events: list[Event]) -> None:
        self._members[member.peer_id] = replace(member, presence=presence)
        text = "left in order" if presence is Presence.LEFT else "was lost: its record expired without a goodbye"
        events.append(Event(at, str(presence), member.peer_id, text))

    def _forget(self, at: float) -> None:
        for member in self.members:
            if member.presence is not Presence.LIVE and member.last_seen < at - KEPT_S:
                del self._members[member.peer_id]


def limited(events: list[Event]) -> list[Event]:
    """The events, or a number in their place where there are very many of a kind."""
    counts = Counter(event.kind for event in events)
    few = [event for event in events if counts[event.kind] <= _MAX_TOLD]
    many = [kind for kind, number in counts.items() if number > _MAX_TOLD]
    return few + [Event(events[0].at, kind, "", f"{counts[kind]} peers at once") for kind in many]
