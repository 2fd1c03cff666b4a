"""What peers fetch from each other outside the rounds: the training state, and past updates.

Whoever asks checks all of it: lengths before memory is taken, digests after. Nobody is asked who is behind NAT.
"""

import asyncio
from collections.abc import AsyncIterator as AsyncIteratorABC
from collections.abc import Awaitable, Callable
from typing import AsyncIterator, TypeVar  # noqa: UP035  # hivemind reads the annotations of rpc_*

import torch
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2

from hivetrain.averaging.held import HeldState
from hivetrain.averaging.state import CHUNK_BYTES, Snapshot, StateError, as_bytes, receive, receive_into
from hivetrain.averaging.updates import Update

T = TypeVar("T")
NETWORK_ERRORS = (P2PDaemonError, P2PHandlerError, ConnectionError, OSError, EOFError)
_MAX_UPLOADS = 4


class TransferService(ServicerBase):
    """Serves the own state to others and fetches theirs. Create it inside a running event loop.

    Args:
        p2p: the DHT node's libp2p daemon.
        prefix: name of the run.
        held: what to serve; None for somebody who only asks.
    """

    def __init__(self, p2p: P2P, prefix: str, held: HeldState | None) -> None:
        self._p2p, self._prefix, self._held = p2p, prefix, held
        self._uploads = asyncio.Semaphore(_MAX_UPLOADS)

    async def start(self) -> None:
        """Begins to serve."""
        await self.add_p2p_handlers(self._p2p, namespace=self._prefix)

    async def stop(self) -> None:
        """Stops serving."""
        await self.remove_p2p_handlers(self._p2p, namespace=self._prefix)

    async def fetch_state(
        self, peer_id: str, module: torch.nn.Module, optimizer: torch.optim.Optimizer, timeout_s: float
    ) -> Snapshot:
        """Fetches a peer's state, checked against the own model.

        Raises:
            StateError: the peer has none to give, or it does not fit, or it did not come in time.
        """

        async def fetch(peer: PeerID) -> Snapshot:
            stream = await self._stub(peer).rpc_download_state(averaging_pb2.DownloadRequest())
            first = await anext(aiter(stream), None)
            if first is None or not first.metadata:
                raise StateError(f"{peer_id[-8:]} has no state to give")
            return await receive(first.metadata, _buffers(stream), module, optimizer)

        return await self._ask(peer_id, "its state", fetch, timeout_s)

    async def fetch_header(self, peer_id: str, epoch: int, timeout_s: float) -> Update:
        """Asks a peer who took part in the update that ended ``epoch``.

        Raises:
            StateError: it does not know (any more), or gave no sensible answer in time.
        """

        async def fetch(peer: PeerID) -> Update:
            request = averaging_pb2.AveragingData(group_id=epoch.to_bytes(8))
            answer = await self._stub(peer).rpc_update_header(request)
            if not answer.tensor_part.buffer:
                raise StateError(f"{peer_id[-8:]} does not hold the update of epoch {epoch}")
            update = Update.parse_header(answer.tensor_part.buffer)
            if update.epoch != epoch:
                raise StateError(f"{peer_id[-8:]} was asked for epoch {epoch} and sent {update.epoch}")
            return update

        return await self._ask(peer_id, "an update's header", fetch, timeout_s)

    async def fetch_average(self, peer_id: str, epoch: int, numel: int, timeout_s: float) -> torch.Tensor:
        """Fetches the averaged gradient of the update that ended ``epoch``, shape (numel,), fp32.

        Raises:
            StateError: the peer does not hold it, or sent too much, too little or too slowly.
        """

        async def fetch(peer: PeerID) -> torch.Tensor:
            request = averaging_pb2.AveragingData(group_id=epoch.to_bytes(8))
            average = torch.empty(numel, dtype=torch.float32)
            await receive_into([average], _buffers(await self._stub(peer).rpc_download_update(request)))
            return average

        return await self._ask(peer_id, f"the update of epoch {epoch}", fetch, timeout_s)

    async def rpc_download_state(
        self, _request: averaging_pb2.DownloadRequest, _context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """A peer that joins or has drifted asks for our state."""
        async with self._uploads:
            snapshot = await asyncio.to_thread(self._held.snapshot) if self._held is not None else None
            if snapshot is None:
                return
            yield averaging_pb2.DownloadData(metadata=snapshot.header())
            for chunk in snapshot.chunks():
                yield averaging_pb2.DownloadData(tensor_part=runtime_pb2.Tensor(buffer=chunk))

    async def rpc_update_header(
        self, request: averaging_pb2.AveragingData, _context: P2PContext
    ) -> averaging_pb2.AveragingData:
        """Somebody asks who took part in an update."""
        update = self._kept(request)
        header = b"" if update is None else update.header()
        return averaging_pb2.AveragingData(tensor_part=runtime_pb2.Tensor(buffer=header))

    async def rpc_download_update(
        self, request: averaging_pb2.AveragingData, _context: P2PContext
    ) -> AsyncIterator[averaging_pb2.DownloadData]:
        """Somebody asks for the averaged gradient of an update."""
        update = self._kept(request)
        if update is None or update.average is None:
            return
        raw = memoryview(as_bytes(update.average))
        async with self._uploads:
            for start in range(0, len(raw), CHUNK_BYTES):
                chunk = bytes(raw[start : start + CHUNK_BYTES])
                yield averaging_pb2.DownloadData(tensor_part=runtime_pb2.Tensor(buffer=chunk))

    def _kept(self, request: averaging_pb2.AveragingData) -> Update | None:
        if self._held is None or len(request.group_id) != 8:
            return None
        return self._held.updates.get(int.from_bytes(request.group_id))

    def _stub(self, peer: PeerID):  # type: ignore[no-untyped-def]
        return self.get_stub(self._p2p, peer, namespace=self._prefix)

    async def _ask(self, peer_id: str, what: str, fetch: Callable[[PeerID], Awaitable[T]], timeout_s: float) -> T:
        try:
            return await asyncio.wait_for(fetch(PeerID.from_base58(peer_id)), timeout_s)
        except TimeoutError:
            raise StateError(f"{peer_id[-8:]} did not send {what} within {timeout_s:g} s") from None
        except (*NETWORK_ERRORS, ValueError) as error:
            raise StateError(f"{peer_id[-8:]} cannot be asked for {what}: {error}") from error


async def _buffers(stream: AsyncIteratorABC[averaging_pb2.DownloadData]) -> AsyncIteratorABC[bytes]:
    async for message in stream:
        yield message.tensor_part.buffer
