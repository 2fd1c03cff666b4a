"""A peer of one run: the network loop with everything that runs on it, behind plain blocking calls.

The training thread sees only this class; it holds no lock across a call and every call has a deadline.
"""

import asyncio
import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from hivemind.dht import DHT
from hivemind.utils import get_dht_time

from hivetrain.averaging.attempt import Attempt
from hivetrain.averaging.averager import Averager
from hivetrain.averaging.codecs import Codec
from hivetrain.averaging.compression import Compressor
from hivetrain.averaging.group import DIGEST_BYTES, NONCE_BYTES, Offer
from hivetrain.averaging.held import HeldState
from hivetrain.averaging.loop import Interrupted, NetworkLoop
from hivetrain.averaging.options import PeerOptions
from hivetrain.averaging.progress import Progress, ProgressBoard, SwarmView
from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.averaging.rules import RULES
from hivetrain.averaging.settings import RunSettings, SettingsMismatch, find_settings
from hivetrain.averaging.state import Snapshot, StateError
from hivetrain.averaging.transfer import TransferService
from hivetrain.swarm.records import read_entries, read_records, store_record

logger = logging.getLogger(__name__)

_NO_CAP = 2**53
_MIN_PEERS_FOR_CAP = 4


class SwarmPeer:
    """Takes part in one run over a DHT node that somebody else opened and will close.

    Args:
        dht: a running DHT node.
        subkey: this peer's protected subkey in the DHT.
        settings: what all peers of the run have in common.
        options: how this peer takes part.
        codec: of the run's compressor.
        held: the state to serve.
    """

    def __init__(
        self, dht: DHT, subkey: bytes, settings: RunSettings, options: PeerOptions, codec: Codec,
        held: HeldState,
    ) -> None:  # fmt: skip
        self._dht, self._subkey, self._settings, self._options, self._held = dht, subkey, settings, options, held
        self._codec = codec
        self._loop = NetworkLoop(f"hivetrain-{options.run_id}")
        self._own = Progress(str(dht.peer_id), settings.fingerprint, client_mode=options.client_mode)
        self._give_up: Callable[[], bool] = lambda: False

    @property
    def peer_id(self) -> str:
        return self._own.peer_id

    def open(self, give_up: Callable[[], bool]) -> None:
        """Starts to serve and to read the others' progress; joins no round yet.

        Args:
            give_up: asked several times a second during every wait.

        Raises:
            SettingsMismatch: the peers of this run have other settings.
            TimeoutError: the DHT does not answer.
        """
        self._give_up = give_up
        self._loop.start()
        self._call(self._open(), 30.0)

    def announce(self, epoch: int, samples: int, samples_per_s: float, digest: str, waiting: bool) -> None:
        """Tells the others where this peer stands; returns at once."""
        self._own = own = replace(
            self._own, epoch=epoch, samples=samples, samples_per_s=samples_per_s,
            digest=bytes.fromhex(digest)[:DIGEST_BYTES],
            waiting=waiting,
        )  # fmt: skip
        self._loop.soon(lambda: self._board.report(own))

    def retract(self) -> None:
        """Takes the own record back, until the next :meth:`announce`; returns at once."""
        self._loop.soon(lambda: self._board.report(None))

    def retire(self) -> None:
        """Tells the others not to wait for this peer any more, which still serves what it holds; returns at once."""
        self._own = own = replace(self._own, retired=True, waiting=False)
        self._loop.soon(lambda: self._board.report(own))

    def view(self) -> SwarmView:
        """The run as last seen; never waits."""
        return self._board.view(self._own)

    def refresh(self) -> SwarmView:
        """Reads all peers' progress anew."""
        try:
            self._call(self._board.fetch(), self._options.record_ttl_s + 1)
        except TimeoutError:
            logger.warning("peers' progress could not be read anew; going by what was known")
        return self.view()

    def start_average(
        self,
        compressor: Compressor,
        gradient: torch.Tensor,
        samples: int,
        commitment: bytes,
        view: SwarmView,
        timeout_s: float,
    ) -> Attempt:
        """Starts to average ``gradient`` (n,), fp32 on CPU, with a majority of the live peers; returns at once."""
        bandwidth = 0.0 if self._options.client_mode else self._options.bandwidth
        own = self._own
        nonce = os.urandom(NONCE_BYTES)
        offer = Offer(
            own.fingerprint, own.epoch, own.digest, samples, bandwidth, nonce, commitment, self._averager.contact
        )
        expected, quorum = len(view.peers), view.quorum
        avoided = self._averager.blame.next_round([peer.peer_id for peer in view.peers], quorum)
        target = max(quorum, view.group_target(own.epoch) - len(avoided))
        stages = compressor.stages(gradient, own.epoch)
        grouped = threading.Event()
        work = self._averager.average(offer, stages, expected, target, quorum, timeout_s, grouped.set, avoided)
        deadline = time.monotonic() + timeout_s + 2 * self.part_timeout_s + 5
        blank = RoundReport(own.epoch, Outcome.UNKNOWN, 1, expected, local_samples=samples)
        return Attempt(blank, gradient, self._loop.spawn(work), deadline, grouped)

    def finish_average(
        self, attempt: "Attempt", obsolete: Callable[[], bool]
    ) -> tuple[RoundReport, torch.Tensor | None]:
        """Waits for an attempt. ``obsolete`` is asked until there is a group; when true, the attempt is given up.

        Raises:
            Interrupted: the program is asked to end.
        """
        try:
            left_s = attempt.deadline - time.monotonic()
            return self._loop.wait(
                attempt.future, left_s, lambda: self._give_up() or (not attempt.grouped.is_set() and obsolete())
            )
        except TimeoutError:
            return replace(attempt.blank, reason="the network loop did not finish the round in time"), None
        except Interrupted:
            if self._give_up():
                raise
            why = "the swarm has gone on without this peer"
            return replace(attempt.blank, outcome=Outcome.NO_GROUP, reason=why), None

    def download(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
        """Fetches the state that most peers hold at the run's epoch.

        Raises:
            StateError: no peer could give it; the message names each attempt.
        """
        view, failures = self.refresh(), []
        donors = [p for p in view.peers if p.peer_id != self.peer_id and not p.client_mode and p.epoch >= view.epoch]
        random.shuffle(donors)
        for donor in sorted(donors, key=lambda p: (p.epoch, p.digest) != (view.epoch, view.digest)):
            try:
                work = self._transfer.fetch_state(donor.peer_id, module, optimizer, self._options.averaging_timeout_s)
                snapshot = self._call(work, self._options.averaging_timeout_s + 5)
            except (StateError, TimeoutError) as error:
                failures.append(str(error))
                continue
            if self._is_held_by_most(snapshot, view):
                return snapshot
            failures.append(f"{donor.peer_id[-8:]} sent a state of epoch {snapshot.epoch} that most peers do not hold")
        raise StateError("; ".join(failures) or "no peer holds the run's state")

    def _is_held_by_most(self, snapshot: Snapshot, view: SwarmView) -> bool:
        """Whether most peers hold the snapshot, as seen before the download or, if they went on meanwhile, now."""
        held = (snapshot.epoch, bytes.fromhex(snapshot.digest)[:DIGEST_BYTES])
        deadline = time.monotonic() + self._options.matchmaking_time_s
        while view.epoch < snapshot.epoch and time.monotonic() < deadline:
            view = self.refresh()
        return held == (view.epoch, view.digest)

    def publish(self, key: str, subkey: bytes, value: bytes, expires: float, timeout_s: float) -> bool:
        """Stores a record that a hotkey sealed; returns whether it was taken. Safe on any thread."""
        try:
            return self._call(store_record(self._dht, key, subkey, value, expires, timeout_s), timeout_s + 1)
        except TimeoutError:
            return False

    def publish_own(self, key: str, value: bytes, expires: float, timeout_s: float) -> bool:
        """Stores a record that only this peer can write; returns whether it was taken. On any thread."""
        return self.publish(key, self._subkey, value, expires, timeout_s)

    def collect(self, key: str, timeout_s: float) -> dict[bytes, tuple[bytes, float]]:
        """Reads the records that hotkeys sealed: subkey -> (record, expiration). Safe on any thread.

        Raises:
            TimeoutError: the DHT does not answer.
        """
        return self._call(read_records(self._dht, key, timeout_s), timeout_s + 1)

    def close(self, timeout_s: float = 3.0) -> None:
        """Withdraws the record and stops the loop; bounded by about ``timeout_s``, never raises on network faults."""
        self._give_up = lambda: False
        with contextlib.suppress(Exception):  # best effort: the record expires by itself
            self._loop.call(self._close(), timeout_s)
        self._loop.stop()

    @property
    def part_timeout_s(self) -> float:
        """Longest silence of a groupmate during an exchange, and longest wait for its ballot."""
        return max(1.0, self._options.averaging_timeout_s / 6)

    def max_samples(self, num_peers: int) -> int:
        """Cap on one peer's samples in a swarm, or a group, of ``num_peers``."""
        if self._options.max_samples_per_peer is not None:
            return self._options.max_samples_per_peer
        return max(1, self._settings.target_batch_size // 4) if num_peers >= _MIN_PEERS_FOR_CAP else _NO_CAP

    def _call(self, work, timeout_s: float):  # type: ignore[no-untyped-def]
        return self._loop.call(work, timeout_s, self._give_up)

    async def _open(self) -> None:
        options, settings = self._options, self._settings
        self._averager = Averager(
            self._dht,
            options.run_id,
            self._codec,
            matchmaking_time_s=options.matchmaking_time_s,
            part_timeout_s=self.part_timeout_s,
            client_mode=options.client_mode,
            max_samples=self.max_samples,
            rule=RULES[settings.reduction],
            direct=options.direct,
            max_upload_mbit_s=options.max_upload_mbit_s,
        )
        self._board = ProgressBoard(
            self._dht,
            f"{options.run_id}_progress",
            self._subkey,
            options.record_ttl_s,
            settings.target_batch_size,
            lambda num_peers: 2 * self.max_samples(num_peers),  # no liar fills a batch, no fast peer is held up
        )
        p2p = await self._dht.replicate_p2p()
        await self._averager.start(p2p)
        self._transfer = TransferService(p2p, options.run_id, self._held)
        if not options.client_mode:
            await self._transfer.start()
        await self._board.fetch()
        await self._check_settings()
        self._tasks = [
            asyncio.create_task(self._board.publish_forever()),
            asyncio.create_task(self._board.fetch_forever()),
            asyncio.create_task(self._publish_settings()),
        ]

    async def _check_settings(self) -> None:
        view = self._board.view(self._own)
        if len(view.strangers) <= len(view.peers) - 1 or not view.strangers:
            return
        fingerprint = view.strangers[0].fingerprint
        entries = await read_entries(self._dht, self._settings_key(fingerprint), self._options.averaging_timeout_s)
        theirs = find_settings(entries.values(), fingerprint)
        raise SettingsMismatch(
            f"run {self._options.run_id!r} has {len(view.strangers)} peer(s) with other settings: "
            f"{self._settings.differences(theirs, fingerprint)}. Use the run's settings or another run_id."
        )

    async def _publish_settings(self) -> None:
        key, ttl_s = self._settings_key(self._settings.fingerprint), 600.0
        while True:
            value, expires = self._settings.to_bytes(), get_dht_time() + ttl_s
            await self._dht.store(key, value, expires, subkey=self._subkey, return_future=True)
            await asyncio.sleep(ttl_s / 3)

    def _settings_key(self, fingerprint: bytes) -> str:
        return f"{self._options.run_id}_settings_{fingerprint.hex()}"

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        started = time.monotonic()
        await self._board.withdraw()
        await self._averager.stop()
        if not self._options.client_mode:
            await self._transfer.stop()
        logger.debug("left the run in %.2f s", time.monotonic() - started)
