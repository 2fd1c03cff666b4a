"""Follows a run from outside: reads what the peers say and fetches their updates; announces and contributes nothing."""

import asyncio
import collections
import contextlib
import logging
import random
from collections.abc import Callable, Collection, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import torch
from hivemind.dht import DHT

from hivetrain.averaging.group import DIGEST_BYTES
from hivetrain.averaging.loop import NetworkLoop
from hivetrain.averaging.progress import Progress, ProgressBoard, SwarmView
from hivetrain.averaging.settings import RunSettings
from hivetrain.averaging.state import Snapshot, StateError
from hivetrain.averaging.transfer import TransferService
from hivetrain.averaging.updates import Update
from hivetrain.swarm.records import read_records, store_record

logger = logging.getLogger(__name__)
T = TypeVar("T")

_MAX_WITNESSES = 7


class SwarmObserver:
    """An outsider's view of one run.

    Args:
        dht: a running DHT node that somebody else opened and will close.
        run_id: name of the run.
        settings: what all peers of the run have in common; only peers with the same are seen.
        timeout_s: limit for a single request to a peer or to the DHT.
        record_ttl_s: as the peers have it; bounds a reading of their records.
        give_up: asked several times a second during every wait.
    """

    def __init__(
        self, dht: DHT, run_id: str, settings: RunSettings, timeout_s: float, record_ttl_s: float = 30.0,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._dht, self._run_id, self._settings = dht, run_id, settings
        self._timeout_s, self._record_ttl_s, self._give_up = timeout_s, record_ttl_s, give_up
        self._loop = NetworkLoop(f"hivetrain-observer-{run_id}")
        self._nobody = Progress("", settings.fingerprint)

    def open(self) -> None:
        """Starts to read.

        Raises:
            TimeoutError: the DHT does not answer.
        """
        self._loop.start()
        self._call(self._open(), self._timeout_s)

    def close(self) -> None:
        """Stops; takes some seconds at most."""
        self._loop.stop()

    def view(self) -> SwarmView:
        """The run as read just now; without peers while there are none, or none with these settings."""
        with contextlib.suppress(TimeoutError):
            self._call(self._board.fetch(), self._record_ttl_s + 1)
        view = self._board.view(self._nobody)
        peers = tuple(peer for peer in view.peers if peer.peer_id)
        return SwarmView.of((*peers, *view.strangers), self._settings.fingerprint, view.max_samples)

    def fetch_update(self, epoch: int, view: SwarmView) -> Update:
        """The update that ended ``epoch``, with the members that most of the peers asked say were in it.

        Its average comes from one peer: whoever applies it compares the params' digest with the peers'.

        Raises:
            StateError: too few peers hold it.
        """
        update, witnesses = self._call(self._ask_witnesses(epoch, view), 2 * self._timeout_s)
        failures = []
        for peer_id in witnesses:
            fetch = self._transfer.fetch_average(peer_id, epoch, self._settings.num_params, self._timeout_s)
            try:
                return replace(update, average=self._call(fetch, self._timeout_s + 1))
            except (StateError, TimeoutError) as error:
                failures.append(str(error))
        raise StateError("; ".join(failures))

    def download(self, view: SwarmView, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        """Fetches the state that most peers hold at the run's epoch.

        Raises:
            StateError: no peer could give it; the message names each attempt.
        """
        failures = []
        for peer in self._dialled(view):
            if (peer.epoch, peer.digest) != (view.epoch, view.digest):
                continue
            fetch = self._transfer.fetch_state(peer.peer_id, module, optimizer, self._timeout_s)
            try:
                snapshot = self._call(fetch, self._timeout_s + 1)
            except (StateError, TimeoutError) as error:
                failures.append(str(error))
                continue
            now = self.view() if snapshot.epoch != view.epoch else view
            if (snapshot.epoch, bytes.fromhex(snapshot.digest)[:DIGEST_BYTES]) == (now.epoch, now.digest):
                return snapshot
            failures.append(f"{peer.peer_id[-8:]} sent a state of epoch {snapshot.epoch} that most peers do not hold")
        raise StateError("; ".join(failures) or "no peer holds the run's state")

    def collect(self, key: str, wanted: Collection[bytes], timeout_s: float) -> dict[bytes, tuple[bytes, float]]:
        """Reads the records that hotkeys sealed, under the wanted subkeys alone: subkey -> (record, expiration).

        Raises:
            TimeoutError: the DHT does not answer.
        """
        return self._call(read_records(self._dht, key, timeout_s, wanted), timeout_s + 1)

    def header(self, epoch: int, view: SwarmView) -> Update:
        """The update that ended ``epoch`` without its average: who was in it, as most of the peers asked say.

        Raises:
            StateError: too few peers hold it.
        """
        return self._call(self._ask_witnesses(epoch, view), 2 * self._timeout_s)[0]

    def publish(self, key: str, subkey: bytes, value: bytes, expires: float, timeout_s: float) -> bool:
        """Stores a record that a hotkey sealed; returns whether it was taken."""
        return self._call(store_record(self._dht, key, subkey, value, expires, timeout_s), timeout_s + 1)

    async def _open(self) -> None:
        target = self._settings.target_batch_size
        key = f"{self._run_id}_progress"
        self._board = ProgressBoard(self._dht, key, b"", self._record_ttl_s, target, lambda _: target)
        self._transfer = TransferService(await self._dht.replicate_p2p(), self._run_id, held=None)
        await self._board.fetch()

    async def _ask_witnesses(self, epoch: int, view: SwarmView) -> tuple[Update, list[str]]:
        asked = [peer.peer_id for peer in self._dialled(view) if peer.epoch > epoch][:_MAX_WITNESSES]
        requests = [self._transfer.fetch_header(peer_id, epoch, self._timeout_s) for peer_id in asked]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, StateError):
                raise answer
        known = {peer: answer for peer, answer in zip(asked, answers, strict=True) if isinstance(answer, Update)}
        if not known:
            why = "; ".join(str(answer) for answer in answers) or "nobody has got there yet"
            raise StateError(f"no peer tells of the update of epoch {epoch}: {why}")
        votes = collections.Counter(known.values())
        update = min(votes, key=lambda candidate: (-votes[candidate], candidate.header()))
        if len(votes) > 1:
            logger.warning("peers tell different things of the update of epoch %d; %d of %d agree",
                           epoch, votes[update], len(known))  # fmt: skip
        if 2 * votes[update] <= len(known):
            raise StateError(f"the peers do not agree on who made the update of epoch {epoch}")
        return update, [peer for peer, answer in known.items() if answer == update]

    def _dialled(self, view: SwarmView) -> list[Progress]:
        peers = [peer for peer in view.peers if not peer.client_mode]
        random.shuffle(peers)
        return peers

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        return self._loop.call(work, timeout_s, self._give_up)
