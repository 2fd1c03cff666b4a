"""The peer's side of the swarm's protocol: group, exchange, vote."""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from hivemind.dht import DHT
from hivemind.p2p import P2P

from hivetrain.averaging.blame import Blame
from hivetrain.averaging.codecs import Codec
from hivetrain.averaging.compression import Stages
from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.direct.options import DirectOptions
from hivetrain.averaging.direct.paths import Paths
from hivetrain.averaging.group import Group, Matchmaker, Offer
from hivetrain.averaging.libp2p import LibP2PChannel, RoundService
from hivetrain.averaging.memory import ResultMemory
from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.averaging.round import Round, RoundTable, Verdict
from hivetrain.averaging.rules import RULES, Rule
from hivetrain.averaging.staged import StagedExchange
from hivetrain.averaging.transport import Channel

logger = logging.getLogger(__name__)


class Averager:
    """Runs rounds with other peers.

    Args:
        dht: a running DHT node.
        prefix: name of the run; peers with another prefix are never met.
        codec: encoding of the exchanged vector; part of the run's settings.
        matchmaking_time_s: how long a round waits for peers that have not come yet.
        part_timeout_s: longest silence of a groupmate during an exchange.
        max_samples: cap on a member's averaging weight, given the number of members.
        rule: how the members' gradients become one; part of the run's settings.
        direct: how this peer takes part in direct links; None: it uses libp2p alone.
        max_upload_mbit_s: limit on what this peer sends in exchanges, over all members.
    """

    def __init__(
        self, dht: DHT, prefix: str, codec: Codec, *, matchmaking_time_s: float, part_timeout_s: float,
        client_mode: bool, max_samples: Callable[[int], int], rule: Rule = RULES["mean"],
        direct: DirectOptions | None = None, max_upload_mbit_s: float | None = None,
    ) -> None:  # fmt: skip
        self._dht, self._prefix, self._codec = dht, prefix, codec
        self._matchmaking_time_s, self._part_timeout_s = matchmaking_time_s, part_timeout_s
        self._client_mode, self._max_samples = client_mode, max_samples
        self._rule, self._direct = rule, direct
        self._bucket = None if max_upload_mbit_s is None else TokenBucket(max_upload_mbit_s * 1e6 / 8)
        self._paths: Paths | None = None
        self._memory = ResultMemory()
        self.blame = Blame()

    async def start(self, p2p: P2P) -> None:
        """Begins to serve through the DHT node's libp2p daemon."""
        self._p2p, self._rounds = p2p, RoundTable()
        self._service = RoundService(p2p, self._prefix, self._rounds, self._part_timeout_s, self._bucket)
        self._matchmaker = self._service.matchmaker = Matchmaker(
            self._p2p,
            self._dht,
            RoundService,
            self._prefix,
            hashlib.sha256(self._prefix.encode()).digest(),
            self._matchmaking_time_s,
            self._client_mode,
        )
        if self._direct is not None:
            self._paths = self._direct.open(
                self._prefix, self._service, self._rounds, self._part_timeout_s, self._bucket, self._client_mode
            )
        if not self._client_mode:
            await self._service.start()

    async def stop(self) -> None:
        """Stops serving."""
        if not self._client_mode:
            await self._service.stop()
        if self._paths is not None:
            await self._paths.stop()

    @property
    def contact(self) -> bytes:
        """What an offer says of this peer's direct links."""
        return b"" if self._paths is None else self._paths.contact.to_bytes()

    async def average(
        self,
        offer: Offer,
        stages: Stages,
        expected_peers: int,
        target: int,
        quorum: int,
        timeout_s: float,
        on_group: Callable[[], None],
        avoided: frozenset[str] = frozenset(),
    ) -> tuple[RoundReport, torch.Tensor | None]:
        """Tries to average with a quorum of peers.

        Args:
            offer: what this peer brings.
            stages: a compressor at work on its gradient.
            expected_peers: live peers of the run, for the report.
            target: the group is complete when it has this many members.
            quorum: a smaller group is no success.
            timeout_s: limit for the whole attempt.
            on_group: called when a group has been found.
            avoided: peers that are left out if this peer leads the group, and that it does not follow.

        Returns the report and, if and only if its outcome is ``AVERAGED``, the averaged gradient, shape (n,).
        """
        start = time.monotonic()
        report = RoundReport(offer.epoch, Outcome.NO_GROUP, 1, expected_peers, local_samples=offer.samples)
        self._matchmaker.avoided = avoided
        group = await self._matchmaker.find(offer, target, quorum, min(timeout_s, 2 * self._matchmaking_time_s))
        report = replace(report, matchmaking_s=time.monotonic() - start)
        if group is None:
            return replace(report, reason="no group of a quorum was found"), None
        if self._p2p.peer_id not in group.peer_ids:
            why = group.left_out.get(self._p2p.peer_id, "the group lists this peer no longer")
            return replace(report, outcome=Outcome.EXCLUDED, reason=f"left out by the group: {why}"), None
        if group.offers[group.peer_ids.index(self._p2p.peer_id)] != offer:
            return replace(
                report, outcome=Outcome.DISAGREED, reason="the group's leader changed this peer's offer"
            ), None
        size = len(group.peer_ids)
        report = replace(report, group_size=size)
        if size < quorum:
            why = "; ".join(f"{str(peer)[-8:]}: {reason}" for peer, reason in group.left_out.items())
            return replace(report, outcome=Outcome.BELOW_QUORUM, reason=f"{size} of {quorum} needed. {why}"), None
        if not any(member.bandwidth for member in group.offers):
            return replace(report, outcome=Outcome.BELOW_QUORUM, reason="no member can be dialled"), None
        on_group()
        verdict, links = await self._run_round(group, stages, max(1.0, timeout_s - report.matchmaking_s))
        committed = verdict.outcome is Outcome.AVERAGED
        report = replace(
            report,
            outcome=verdict.outcome,
            fraction=verdict.fraction,
            samples=sum(member.samples for member in group.offers) if committed else 0,
            members=group.members(self._max_samples(size)) if committed else (),
            exchange_s=verdict.seconds,
            bytes_sent=verdict.bytes_sent,
            bytes_received=verdict.bytes_received,
            reason=verdict.reason,
            links=links,
            blamed=tuple(str(group.peer_ids[member]) for member in verdict.culprits),
        )
        if committed:
            self.blame.atone(member.peer_id for member in report.members)
        for peer_id in report.blamed:
            self.blame.add(peer_id)
        return report, verdict.average

    async def _run_round(self, group: Group, stages: Stages, timeout_s: float) -> tuple[Verdict, dict[str, str]]:
        me = group.peer_ids.index(self._p2p.peer_id)
        weights = group.weights(self._max_samples(len(group.peer_ids)))
        exchange = StagedExchange(
            me, weights, group.layout, stages, self._codec, self._part_timeout_s, self._rule, self._memory
        )
        round_ = Round(group, me, exchange, self._part_timeout_s)
        await self._rounds.add(round_)
        paths = {} if self._paths is None else self._paths.channels(group, me)
        channels: dict[int, Channel] = {
            member: paths.get(member) or LibP2PChannel(self._service, group, member)
            for member in range(len(group.peer_ids))
            if member != me
        }
        try:
            verdict = await round_.run(channels, timeout_s)
            return verdict, {str(group.peer_ids[member]): channel.name for member, channel in channels.items()}
        finally:
            self._rounds.forget(round_, 2 * self._part_timeout_s)
            if self._paths is not None:
                self._paths.leave(group, paths)
