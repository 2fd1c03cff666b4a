"""What each member of an exchange has sent and taken, and since when it owes this one something, by the own clock.

The surprising fact: nobody is late with what it could not send yet. A part is owed once the average that opens the
window for it has been taken, and an average once the own part has left. So a slow member sees that it is the others
who wait, and does not give up on them first.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# In part timeouts. A reducer waits for others before it answers; so that it can name them first, it gets more time than
# they do, even if they take their time to take its averages.
PATIENCE = 2.0
_TAKING = 1.5


@dataclass(frozen=True)
class Debt:
    """Something that a member owes.

    Attributes:
        kind: ``part`` of the own slice, ``average`` of its slice, or ``taking`` what this member has for it first.
        index: of the part or average.
        since: monotonic time.
        limit: after how many part timeouts it is a fault.
    """

    kind: str
    index: int
    since: float
    limit: float


class Debts:
    """Counts of one member. Any thread may count; each count of a member is changed by one thread at a time.

    Args:
        me: this member's index.
        parts: number of parts of each member's slice.
        window: parts that a member may send ahead of the averages that it has taken.
        clock: monotonic seconds.
    """

    def __init__(self, me: int, parts: Sequence[int], window: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.me, self.parts, self.window, self._clock = me, parts, window, clock
        self.completed = 0  # averages of the own slice
        self.begun_at = self.completed_at = now = clock()
        self.received = [0] * len(parts)  # parts of the own slice, by sender
        self.given = [0] * len(parts)  # averages of the own slice whose sending has begun, by who gets them
        self.taken = [0] * len(parts)  # those that have left
        self.sent = [0] * len(parts)  # own parts that have left, by their reducer
        self.averaged = [0] * len(parts)  # averages, by their reducer
        self._waited_s = [0.0] * len(parts)  # for each member alone, with parts of the own slice
        self._alone_since: dict[int, tuple[int, float]] = {}  # by part: the only member that has not sent it
        self._opened_at, self._asked_at, self._sent_at, self._averaged_at = ([now] * len(parts) for _ in range(4))

    def await_alone(self, index: int, member: int) -> None:
        """Only one member has not sent a part of the own slice yet."""
        self._alone_since[index] = member, self._clock()

    def complete(self, index: int) -> None:
        """An average of the own slice is there."""
        self._count_waiting(self._waited_s, index)
        self._alone_since.pop(index, None)
        self.completed_at, self.completed = self._clock(), index + 1

    def take(self, member: int, index: int) -> None:
        """A member has an average of the own slice."""
        if index != self.taken[member]:
            return
        if index + self.window == self.received[member]:
            self._opened_at[member] = self._clock()
        self.taken[member] = index + 1

    def send(self, member: int, index: int) -> None:
        """A part that a member reduces has left."""
        self._sent_at[member] = self._clock()
        if index == self.averaged[member]:
            self._asked_at[member] = self._sent_at[member]
        self.sent[member] = index + 1

    def store(self, member: int, index: int) -> None:
        """An average has come from its reducer."""
        self._averaged_at[member] = self._clock()
        self.averaged[member] = index + 1

    def of(self, member: int) -> list[Debt]:
        """What a member owes now."""
        debts, completed, part, average = [], self.completed, self.received[member], self.averaged[member]
        if part <= completed < self.parts[self.me]:
            if part < self.taken[member] + self.window:
                debts.append(Debt("part", part, max(self.completed_at, self._opened_at[member]), 1.0))
            else:
                debts.append(Debt("taking", part, self.completed_at, _TAKING))
        if average < self.parts[member]:
            if self.sent[member] > average:
                since = max(self._averaged_at[member], self._asked_at[member])
                debts.append(Debt("average", average, since, PATIENCE))
            else:
                debts.append(Debt("taking", average, max(self._averaged_at[member], self._sent_at[member]), PATIENCE))
        return debts

    def late(self, others: Sequence[int], least_s: float) -> list[int]:
        """Which of the others have owed a part for a while; nobody if that is true of all: then it is the own line."""
        now = self._clock()
        return _not_all(
            [m for m in others if any(debt.kind == "part" and now - debt.since >= least_s for debt in self.of(m))],
            others,
        )

    def brakes(self, least_s: float) -> list[int]:
        """Members for whom alone the own slice has waited so long in all, and half of the time so far."""
        waited_s = list(self._waited_s)
        self._count_waiting(waited_s, self.completed)
        least_s = max(least_s, (self._clock() - self.begun_at) / 2)
        return [member for member, seconds in enumerate(waited_s) if seconds >= least_s]

    def late_reducers(self, others: Sequence[int], least_s: float) -> list[int]:
        """Members whose averages alone have been missing for so long, with all else done; nobody if that is all."""
        reducers = [member for member in others if self.parts[member]]
        late = [m for m in reducers if self.averaged[m] < self.parts[m]]
        if self.completed < self.parts[self.me] or any(self.sent[m] <= self.averaged[m] for m in late):
            return []
        done_at = max(self.completed_at, *(self._averaged_at[m] for m in reducers if m not in late), self.begun_at)
        return _not_all(late, reducers) if self._clock() - done_at >= least_s else []

    def _count_waiting(self, waited_s: list[float], index: int) -> None:
        """Adds how long a part has waited for one member alone."""
        if (alone := self._alone_since.get(index)) is not None:
            member, since = alone
            waited_s[member] += max(0.0, self._clock() - max(since, self.completed_at, self._opened_at[member]))


def _not_all(late: list[int], others: Sequence[int]) -> list[int]:
    return late if len(late) < len(others) or len(late) == 1 else []
