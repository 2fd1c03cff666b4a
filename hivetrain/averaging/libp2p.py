"""Rounds over libp2p: reaches every peer, through relays and NAT if need be, at the price of the daemon's copies.

It serves remote calls on the network loop of this process (hivemind's averager is a process of its own; here the only
extra processes are the DHT node and its libp2p daemon, so there is less that can be left behind).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from collections.abc import AsyncIterator as AsyncIteratorABC
from typing import AsyncIterator  # noqa: UP035  # hivemind reads the annotations of rpc_* and knows this one only

from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2

from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.exchange import Exchange
from hivetrain.averaging.group import GROUP_NAME_BYTES, Group, Matchmaker
from hivetrain.averaging.reduction import ExchangeError
from hivetrain.averaging.round import RoundTable, excuse_for
from hivetrain.averaging.transfer import NETWORK_ERRORS
from hivetrain.averaging.transport import Channel


class RoundService(ServicerBase):
    """What groupmates call, and how to call them. Create it inside a running event loop.

    Args:
        prefix: name of the run; peers with another prefix are never met.
        rounds: the rounds that this peer is in.
        part_timeout_s: longest silence of a groupmate.
        bucket: limit on the upload.
    """

    matchmaker: Matchmaker

    def __init__(
        self, p2p: P2P, prefix: str, rounds: RoundTable, part_timeout_s: float, bucket: TokenBucket | None = None
    ) -> None:
        self._p2p, self._prefix, self._rounds, self._part_timeout_s = p2p, prefix, rounds, part_timeout_s
        self._bucket = bucket
        self.on_declined: Callable[[bytes, PeerID], None] = lambda group, peer_id: None

    async def start(self) -> None:
        """Begins to serve."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    async def stop(self) -> None:
        """Stops serving."""
        await self.remove_p2p_handlers(self._p2p, namespace=self._prefix)

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        """A peer wants to join the group that is forming here."""
        if not self.matchmaker.accepts(request, context.remote_id):
            yield averaging_pb2.MessageFromLeader(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        async for response in self.matchmaker.answer(request, context):
            yield response

    async def rpc_exchange(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """A groupmate sends its parts of our slice and receives the averages."""
        try:
            first = await asyncio.wait_for(anext(aiter(stream)), self._part_timeout_s)
        except (TimeoutError, StopAsyncIteration):
            yield averaging_pb2.AveragingData(code=averaging_pb2.CANCELLED)
            return
        name, stage = first.group_id[:-1], first.group_id[-1:]
        found = await self._rounds.find(name, context.remote_id)
        if found is None or not stage:
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            return
        round_, member = found

        async def parts() -> AsyncIteratorABC[bytes]:
            yield first.tensor_part.buffer
            async for message in stream:
                yield message.tensor_part.buffer

        try:
            async for average in round_.exchange.serve(stage[0], member, parts()):
                await self._pace(average)
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.AVERAGED_PART, tensor_part=runtime_pb2.Tensor(buffer=average)
                )
        except ExchangeError as error:
            yield averaging_pb2.AveragingData(
                code=averaging_pb2.CANCELLED, tensor_part=runtime_pb2.Tensor(buffer=excuse_for(error.culprits))
            )

    async def rpc_decline(
        self, request: averaging_pb2.AveragingData, context: P2PContext
    ) -> averaging_pb2.AveragingData:
        """A groupmate that was to find a direct link has found none."""
        if len(request.group_id) == GROUP_NAME_BYTES:
            self.on_declined(request.group_id, context.remote_id)
        return averaging_pb2.AveragingData(code=averaging_pb2.ACCEPTED)

    async def rpc_vote(self, request: averaging_pb2.AveragingData, context: P2PContext) -> averaging_pb2.AveragingData:
        """A groupmate tells its ballot; the answer is ours."""
        found = await self._rounds.find(request.group_id, context.remote_id)
        if found is None:
            return averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
        round_, member = found
        try:
            ballot = await round_.answer_ballot(member, request.tensor_part.buffer)
        except TimeoutError:
            return averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR)
        return averaging_pb2.AveragingData(
            code=averaging_pb2.AVERAGED_PART, tensor_part=runtime_pb2.Tensor(buffer=ballot)
        )

    async def open_stream(
        self, group_and_stage: bytes, peer_id: PeerID, parts: AsyncIteratorABC[bytes]
    ) -> AsyncGenerator[bytes, None]:
        """Sends a peer its parts and yields the averages."""

        async def messages() -> AsyncIteratorABC[averaging_pb2.AveragingData]:
            name = group_and_stage
            async for part in parts:
                await self._pace(part)
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.PART_FOR_AVERAGING, group_id=name, tensor_part=runtime_pb2.Tensor(buffer=part)
                )
                name = b""  # the first message names the group

        async for message in await self._stub(peer_id).rpc_exchange(messages()):
            if message.code != averaging_pb2.AVERAGED_PART:
                raise self._given_up(group_and_stage[:-1], peer_id, message.tensor_part.buffer)
            yield message.tensor_part.buffer

    async def decline(self, group_name: bytes, peer_id: PeerID) -> None:
        """Tells a groupmate to use libp2p; one that does not hear of it comes to the same end by itself."""
        with contextlib.suppress(*NETWORK_ERRORS, TimeoutError):
            await self._stub(peer_id).rpc_decline(
                averaging_pb2.AveragingData(group_id=group_name), timeout=self._part_timeout_s
            )

    async def send_ballot(self, group_name: bytes, peer_id: PeerID, ballot: bytes) -> bytes:
        """Tells a peer the own ballot and returns its answer. Raises ExchangeError if there is none."""
        message = averaging_pb2.AveragingData(group_id=group_name, tensor_part=runtime_pb2.Tensor(buffer=ballot))
        try:
            answer = await self._stub(peer_id).rpc_vote(message, timeout=self._part_timeout_s)
        except (*NETWORK_ERRORS, TimeoutError) as error:
            raise ExchangeError(f"no answer of {str(peer_id)[-8:]}: {error}") from error
        if answer.code != averaging_pb2.AVERAGED_PART:
            raise ExchangeError(f"{str(peer_id)[-8:]} does not know the group")
        return bytes(answer.tensor_part.buffer)

    def _given_up(self, group_name: bytes, peer_id: PeerID, excuse: bytes) -> ExchangeError:
        found = self._rounds.get(group_name, peer_id)
        if found is None:
            return ExchangeError(f"{str(peer_id)[-8:]} has given up")
        round_, member = found
        return round_.given_up(member, excuse)

    async def _pace(self, data: bytes) -> None:
        if self._bucket is not None:
            await asyncio.sleep(self._bucket.reserve(len(data)))

    def _stub(self, peer_id: PeerID):  # type: ignore[no-untyped-def]
        return self.get_stub(self._p2p, peer_id, namespace=self._prefix)


class LibP2PChannel(Channel):
    """A way to a member through the libp2p daemon."""

    name = "libp2p"

    def __init__(self, service: RoundService, group: Group, member: int) -> None:
        self._service, self._group, self._member = service, group, member
        self._peer_id = group.peer_ids[member]

    async def exchange(self, stage: int, exchange: Exchange) -> None:
        name = self._group.name + bytes([stage])

        def open_stream(_member: int, parts: AsyncIteratorABC[bytes]) -> AsyncGenerator[bytes, None]:
            return self._service.open_stream(name, self._peer_id, parts)

        try:
            await exchange.talk_over(open_stream, self._member)
        except NETWORK_ERRORS as error:
            raise ExchangeError(f"member {self._member} is gone: {error}", [self._member]) from error

    async def vote(self, ballot: bytes) -> bytes:
        return await self._service.send_ballot(self._group.name, self._peer_id, ballot)
