"""The peer's side of the swarm's protocol: group, exchange, vote.

It serves remote calls on the network loop of this process (hivemind's averager is a process of its own; here the only
extra processes are the DHT node and its libp2p daemon, so there is less that can be left behind).
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from collections.abc import AsyncIterator as AsyncIteratorABC
from dataclasses import replace
from typing import AsyncIterator  # noqa: UP035  # hivemind reads the annotations of rpc_* and knows this one only

import torch
from hivemind.dht import DHT
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2

from hivetrain.averaging.codecs import Codec
from hivetrain.averaging.compression import Stages
from hivetrain.averaging.exchange import ExchangeError, Layout
from hivetrain.averaging.group import Group, Matchmaker, Offer
from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.averaging.round import Round, Verdict
from hivetrain.averaging.staged import StagedExchange
from hivetrain.averaging.transfer import NETWORK_ERRORS

logger = logging.getLogger(__name__)

_EARLY_S = 10.0  # how long a groupmate's message may be ahead of the group's own arrival here
_MAX_EARLY = 256


class Averager(ServicerBase):
    """Runs rounds with other peers.

    Args:
        dht: a running DHT node.
        prefix: name of the run; peers with another prefix are never met.
        codec: encoding of the exchanged vector; part of the run's settings.
        matchmaking_time_s: how long a round waits for peers that have not come yet.
        part_timeout_s: longest silence of a groupmate during an exchange.
        max_samples: cap on a member's averaging weight, given the number of members.
    """

    def __init__(
        self, dht: DHT, prefix: str, codec: Codec, *, matchmaking_time_s: float, part_timeout_s: float,
        client_mode: bool, max_samples: Callable[[int], int],
    ) -> None:  # fmt: skip
        self._dht, self._prefix, self._codec = dht, prefix, codec
        self._matchmaking_time_s, self._part_timeout_s = matchmaking_time_s, part_timeout_s
        self._client_mode, self._max_samples = client_mode, max_samples
        self._rounds: dict[bytes, Round] = {}
        self._new_round = asyncio.Condition()
        self._early = 0

    async def start(self, p2p: P2P) -> None:
        """Begins to serve through the DHT node's libp2p daemon."""
        self._p2p = p2p
        self._matchmaker = Matchmaker(
            self._p2p,
            self._dht,
            type(self),
            self._prefix,
            hashlib.sha256(self._prefix.encode()).digest(),
            self._matchmaking_time_s,
            self._client_mode,
        )
        if not self._client_mode:
            await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    async def stop(self) -> None:
        """Stops serving."""
        if not self._client_mode:
            await self.remove_p2p_handlers(self._p2p, namespace=self._prefix)

    async def average(
        self,
        offer: Offer,
        stages: Stages,
        expected_peers: int,
        target: int,
        quorum: int,
        timeout_s: float,
        on_group: Callable[[], None],
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

        Returns the report and, if and only if its outcome is ``AVERAGED``, the averaged gradient, shape (n,).
        """
        start = time.monotonic()
        report = RoundReport(offer.epoch, Outcome.NO_GROUP, 1, expected_peers, local_samples=offer.samples)
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
        verdict = await self._run_round(group, stages, max(1.0, timeout_s - report.matchmaking_s))
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
        )
        return report, verdict.average

    async def _run_round(self, group: Group, stages: Stages, timeout_s: float) -> Verdict:
        me = group.peer_ids.index(self._p2p.peer_id)
        weights = group.weights(self._max_samples(len(group.peer_ids)))

        def layout(numel: int) -> Layout:
            return Layout.split(numel, group.slices(numel))

        exchange = StagedExchange(me, weights, layout, stages, self._codec, self._part_timeout_s)
        round_ = Round(group, me, exchange, self._part_timeout_s)
        async with self._new_round:
            self._rounds[group.name] = round_
            self._new_round.notify_all()

        def open_stream(stage: int, member: int, parts: AsyncIteratorABC[bytes]) -> AsyncGenerator[bytes, None]:
            return self._open_stream(group.name + bytes([stage]), group.peer_ids[member], parts)

        async def send_ballot(member: int, ballot: bytes) -> bytes:
            return await self._send_ballot(group.name, group.peer_ids[member], ballot)

        try:
            return await round_.run(open_stream, send_ballot, timeout_s)
        finally:
            asyncio.get_running_loop().call_later(2 * self._part_timeout_s, self._rounds.pop, group.name, None)

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """A peer wants to join the group that is forming here."""
        if not self._matchmaker.accepts(request):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for response in self._matchmaker.answer(request, context):
            yield response

    async def rpc_exchange(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """A groupmate sends its parts of our slice and receives the averages."""
        first = await asyncio.wait_for(anext(aiter(stream)), self._part_timeout_s)
        name, stage = first.group_id[:-1], first.group_id[-1:]
        round_ = await self._round_of(name)
        if round_ is None or not stage or context.remote_id not in round_.group.peer_ids:
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            return
        member = round_.group.peer_ids.index(context.remote_id)

        async def parts() -> AsyncIteratorABC[bytes]:
            yield first.tensor_part.buffer
            async for message in stream:
                yield message.tensor_part.buffer

        try:
            async for average in round_.exchange.serve(stage[0], member, parts()):
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.AVERAGED_PART, tensor_part=runtime_pb2.Tensor(buffer=average)
                )
        except ExchangeError:
            yield averaging_pb2.AveragingData(code=averaging_pb2.CANCELLED)

    async def rpc_vote(self, request: averaging_pb2.AveragingData, context: P2PContext) -> averaging_pb2.AveragingData:
        """A groupmate tells its ballot; the answer is ours."""
        round_ = await self._round_of(request.group_id)
        if round_ is None or context.remote_id not in round_.group.peer_ids:
            return averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
        member = round_.group.peer_ids.index(context.remote_id)
        try:
            ballot = await round_.answer_ballot(member, request.tensor_part.buffer)
        except TimeoutError:
            return averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR)
        return averaging_pb2.AveragingData(
            code=averaging_pb2.AVERAGED_PART, tensor_part=runtime_pb2.Tensor(buffer=ballot)
        )

    async def _round_of(self, group_id: bytes) -> Round | None:
        """The round, waiting a little for one that a groupmate learned of before this peer did."""
        if group_id in self._rounds or self._early >= _MAX_EARLY:
            return self._rounds.get(group_id)
        self._early += 1
        try:
            async with self._new_round:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._new_round.wait_for(lambda: group_id in self._rounds), _EARLY_S)
        finally:
            self._early -= 1
        return self._rounds.get(group_id)

    async def _open_stream(
        self, group_and_stage: bytes, peer_id: PeerID, parts: AsyncIteratorABC[bytes]
    ) -> AsyncGenerator[bytes, None]:
        async def messages() -> AsyncIteratorABC[averaging_pb2.AveragingData]:
            name = group_and_stage
            async for part in parts:
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.PART_FOR_AVERAGING, group_id=name, tensor_part=runtime_pb2.Tensor(buffer=part)
                )
                name = b""  # the first message names the group

        try:
            stub = self.get_stub(self._p2p, peer_id, namespace=self._prefix)
            async for message in await stub.rpc_exchange(messages()):
                if message.code != averaging_pb2.AVERAGED_PART:
                    raise ExchangeError(f"{str(peer_id)[-8:]} has given up")
                yield message.tensor_part.buffer
        except NETWORK_ERRORS as error:
            raise ExchangeError(f"{str(peer_id)[-8:]} is gone: {error}") from error

    async def _send_ballot(self, group_id: bytes, peer_id: PeerID, ballot: bytes) -> bytes:
        message = averaging_pb2.AveragingData(group_id=group_id, tensor_part=runtime_pb2.Tensor(buffer=ballot))
        try:
            stub = self.get_stub(self._p2p, peer_id, namespace=self._prefix)
            answer = await stub.rpc_vote(message, timeout=self._part_timeout_s)
        except (*NETWORK_ERRORS, TimeoutError) as error:
            raise ExchangeError(f"no answer of {str(peer_id)[-8:]}: {error}") from error
        if answer.code != averaging_pb2.AVERAGED_PART:
            raise ExchangeError(f"{str(peer_id)[-8:]} does not know the group")
        return bytes(answer.tensor_part.buffer)
