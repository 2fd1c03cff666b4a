"""One atomic round: exchange, then vote, then commit, for all live members or for none.

After the exchange every member tells every other one the digest of what it holds. It commits when all members hold
the same. A member that holds a complete result but misses a ballot cannot know what the others did: its outcome is
``UNKNOWN``, and the params' digest in the next records decides.

The idea of one vote per step in which all failures end: torchft (https://github.com/pytorch/torchft).
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from hivemind.p2p import PeerID

from hivetrain.averaging.group import Group
from hivetrain.averaging.reduction import ExchangeError
from hivetrain.averaging.report import Outcome
from hivetrain.averaging.staged import StagedExchange
from hivetrain.averaging.transport import Channel

logger = logging.getLogger(__name__)

FAILED = b""
BALLOT_BYTES = 32
_EXCUSE_BYTES = 2
_FAILED_FOR_OTHERS = bytes(BALLOT_BYTES)
_EARLY_S = 10.0  # how long a groupmate's message may be ahead of the group's own arrival here
_MAX_EARLY = 256


@dataclass(frozen=True)
class Verdict:
    """How a round ended on this member. ``average`` is there if and only if the outcome is ``AVERAGED``.

    ``culprits`` are the members by whose fault, as far as this member has seen it itself, the exchange failed.
    """

    outcome: Outcome
    average: torch.Tensor | None
    reason: str
    fraction: float
    bytes_sent: int
    bytes_received: int
    seconds: float
    culprits: tuple[int, ...] = ()


class Round:
    """A group's exchange and vote, as one member lives it. Create it inside a running event loop."""

    def __init__(self, group: Group, me: int, exchange: StagedExchange, vote_timeout_s: float) -> None:
        self.group, self.me, self.exchange = group, me, exchange
        self._vote_timeout_s = vote_timeout_s
        loop = asyncio.get_running_loop()
        self._hidden = [member for member, offer in enumerate(group.offers) if offer.bandwidth == 0]
        self._excuse = FAILED
        self._excused: set[int] = set()  # who gave up because of another one
        self._ballots: list[asyncio.Future[bytes]] = [loop.create_future() for _ in group.peer_ids]

    async def run(self, channels: Mapping[int, Channel], timeout_s: float) -> Verdict:
        """Exchanges and votes; takes at most ``timeout_s`` plus the vote's timeout. Never raises on peers' faults."""
        start = time.monotonic()
        average, reason = None, ""
        culprits: tuple[int, ...] = ()
        suspects: list[int] = []
        try:
            average = await asyncio.wait_for(self.exchange.run(channels), timeout_s)
        except ExchangeError as error:
            reason = self._name_members(str(error))
            brakes = self.exchange.brakes(timeout_s - (time.monotonic() - start))
            culprits = error.culprits or tuple(m for m in brakes if m in (error.quitter, error.accused))
        except TimeoutError:
            culprits = tuple(self.exchange.laggards())
            suspects = [] if culprits else self.exchange.late_reducers()
            waited_for = f", waiting for {self._names(culprits or suspects)}" if culprits or suspects else ""
            reason = f"the exchange took longer than {timeout_s:.1f} s{waited_for}"
        except Exception:  # whatever it was, it is this member's own fault, and the training goes on
            logger.exception("the exchange failed on this member")
            reason = "the exchange failed on this member: see its log"
        finally:
            if average is None:
                self.exchange.fail(ExchangeError(reason or "given up", culprits))
        self._excuse = excuse_for(culprits)
        ballot = FAILED if average is None else self._digest()
        self._cast(self.me, ballot)
        outcome, why = await self._vote(ballot, channels)
        # Who reduces waits for others too: it has been asked, and has named one if that was so.
        culprits = culprits or tuple(member for member in suspects if member not in self._excused)
        traffic = self.exchange.traffic
        return Verdict(
            outcome,
            average if outcome is Outcome.AVERAGED else None,
            reason or why,
            traffic.elements / max(1, self.exchange.numel),
            traffic.sent,
            traffic.received,
            time.monotonic() - start,
            culprits,
        )

    async def answer_ballot(self, member: int, ballot: bytes) -> bytes:
        """Takes a member's ballot and answers with the own one as soon as it is known.

        Members that cannot be dialled cannot tell each other their ballots: to one of them the answer adds the others'.

        Raises:
            TimeoutError: the own ballot is not known in time.
        """
        self._cast(member, ballot)
        own = await asyncio.wait_for(asyncio.shield(self._ballots[self.me]), self._vote_timeout_s)
        if own == FAILED:
            return self._excuse
        if member not in self._hidden:
            return own
        others = [hidden for hidden in self._hidden if hidden != member]
        if others:  # leave the answer some time to travel
            await asyncio.wait([self._ballots[hidden] for hidden in others], timeout=self._vote_timeout_s / 2)
        known = [hidden for hidden in others if self._ballots[hidden].done()]
        return own + b"".join(
            hidden.to_bytes(2) + (self._ballots[hidden].result() or _FAILED_FOR_OTHERS) for hidden in known
        )

    def given_up(self, member: int, excuse: bytes) -> ExchangeError:
        """What it means here that a member has given up, with its excuse: see :func:`excuse_for`."""
        text, accused = f"member {member} has given up", int.from_bytes(excuse)
        if len(excuse) != _EXCUSE_BYTES or accused >= len(self.group.peer_ids):
            return ExchangeError(text, quitter=member)
        # Whoever accuses this member has a fault between the two to show for it: that is seen at first hand.
        culprits = [member] if accused == self.me else []
        return ExchangeError(f"{text} because of member {accused}", culprits, member, accused)

    def _cast(self, member: int, ballot: bytes) -> None:
        has_failed = len(ballot) != BALLOT_BYTES
        if not self._ballots[member].done():
            self._ballots[member].set_result(FAILED if has_failed else ballot)
        if has_failed and member != self.me:
            error = self.given_up(member, ballot)
            if error.accused is not None and error.accused not in (member, self.me):
                self._excused.add(member)
            self.exchange.fail(error)

    async def _vote(self, ballot: bytes, channels: Mapping[int, Channel]) -> tuple[Outcome, str]:
        others = [member for member in range(len(self.group.peer_ids)) if member != self.me]
        calls = [asyncio.create_task(self._ask(member, ballot, channels[member])) for member in others]
        await asyncio.wait(calls, timeout=self._vote_timeout_s)
        for call in calls:
            call.cancel()
        if ballot == FAILED:
            return Outcome.INCOMPLETE, "the exchange failed"
        # A ballot may still arrive by the other direction: a member that cannot be dialled dials us.
        waiting = [self._ballots[member] for member in others if not self._ballots[member].done()]
        if waiting:
            await asyncio.wait(waiting, timeout=self._vote_timeout_s)
        known = {member: self._ballots[member].result() for member in others if self._ballots[member].done()}
        failed = [member for member, theirs in known.items() if theirs == FAILED]
        differ = [member for member, theirs in known.items() if theirs not in (FAILED, ballot)]
        silent = [member for member in others if member not in known]
        if failed:
            return Outcome.INCOMPLETE, f"{self._names(failed)} could not complete the exchange"
        if differ:
            return Outcome.DISAGREED, f"{self._names(differ)} hold another result"
        if silent:
            return Outcome.UNKNOWN, f"no ballot of {self._names(silent)} within {self._vote_timeout_s:g} s"
        return Outcome.AVERAGED, ""

    async def _ask(self, member: int, ballot: bytes, channel: Channel) -> None:
        try:
            answer = await channel.vote(ballot or self._excuse)
        except ExchangeError as error:
            logger.debug("ballot of member %d: %s", member, error)
            return
        self._cast(member, answer[:BALLOT_BYTES])
        for start in range(BALLOT_BYTES, len(answer), 2 + BALLOT_BYTES):
            hidden, theirs = int.from_bytes(answer[start : start + 2]), answer[start + 2 : start + 2 + BALLOT_BYTES]
            if hidden in self._hidden and hidden != self.me:
                self._cast(hidden, FAILED if theirs == _FAILED_FOR_OTHERS else theirs)

    def _digest(self) -> bytes:
        """Of what was received, not of what was computed from it: that may differ in the last bit between machines."""
        sha = hashlib.sha256(self.group.name)  # binds the result to who took part with how many samples
        for digest in self.exchange.digests():
            sha.update(digest)
        return sha.digest()

    def _names(self, members: Sequence[int]) -> str:
        return ", ".join(str(self.group.peer_ids[member])[-8:] for member in members)

    def _name_members(self, text: str) -> str:
        def names(match: re.Match[str]) -> str:
            return self._names([int(index) for index in match[1].split(", ")])

        return re.sub(r"member(?:\(s\))? (\d+(?:, \d+)*)", names, text)


def excuse_for(culprits: Sequence[int]) -> bytes:
    """A failed member's ballot: the index of the member at fault, or nothing."""
    return culprits[0].to_bytes(_EXCUSE_BYTES) if culprits else FAILED


class RoundTable:
    """The rounds that this peer is in, by the group's name, for whoever brings a groupmate's message."""

    def __init__(self) -> None:
        self._rounds: dict[bytes, Round] = {}
        self._new_round = asyncio.Condition()
        self._early = 0

    async def add(self, round_: Round) -> None:
        """Makes a round known to groupmates' messages."""
        async with self._new_round:
            self._rounds[round_.group.name] = round_
            self._new_round.notify_all()

    def forget(self, round_: Round, after_s: float) -> None:
        """Drops a round some time from now: groupmates may still ask for its outcome."""
        asyncio.get_running_loop().call_later(after_s, self._rounds.pop, round_.group.name, None)

    async def find(self, name: bytes, peer_id: PeerID) -> tuple[Round, int] | None:
        """A round and the sender's index in it, waiting a little for one that the sender learned of before this peer.

        Returns None if there is no such round or the sender is not in it.
        """
        if name not in self._rounds and self._early < _MAX_EARLY:
            self._early += 1
            try:
                async with self._new_round:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._new_round.wait_for(lambda: name in self._rounds), _EARLY_S)
            finally:
                self._early -= 1
        return self.get(name, peer_id)

    def get(self, name: bytes, peer_id: PeerID) -> tuple[Round, int] | None:
        """As :meth:`find`, without waiting."""
        round_ = self._rounds.get(name)
        if round_ is None or peer_id not in round_.group.peer_ids:
            return None
        return round_, round_.group.peer_ids.index(peer_id)
