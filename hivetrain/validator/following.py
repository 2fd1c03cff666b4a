"""Follows a run through its swarm: the DHT node, the observer and the follower, opened and closed together.

Surprising fact: it may be opened again at any time. What it has followed lies on disk, so when the DHT's process dies,
another one takes over where it was.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

from hivetrain.averaging.observer import SwarmObserver
from hivetrain.averaging.settings import RunSettings
from hivetrain.averaging.state import StateError, schema_of
from hivetrain.averaging.updates import Followed
from hivetrain.errors import UserError
from hivetrain.strategies.epoch_files import EpochFiles
from hivetrain.strategies.follower import Follower, Optimization
from hivetrain.swarm import (
    DEFAULT_HOST_MADDRS,
    DHTUnavailableError,
    SwarmDHT,
    SwarmJoinError,
    resolve_initial_peers,
    start_dht,
)
from hivetrain.validator.config import RunOptions
from hivetrain.validator.run import Records, SwarmFault

logger = logging.getLogger(__name__)

_FAULTS = (OSError, EOFError, StateError, DHTUnavailableError, SwarmJoinError)


class FollowedSwarm:
    """A run, read off its swarm.

    Args:
        options: which run.
        module: its model, on the device where updates are to be made.
        directory: where params of the last epochs are kept.
    """

    def __init__(self, options: RunOptions, module: LightningModule, directory: Path) -> None:
        self._options, self._module, self._directory = options, module, directory
        self._dht: SwarmDHT | None = None
        self._observer: SwarmObserver | None = None
        self._follower: Follower | None = None
        self._num_peers, self._caught_up = 0, False

    def open(self) -> None:
        """Joins the swarm, and takes up what was followed before.

        Raises:
            UserError: the swarm cannot be joined, the model cannot be followed, or what is on disk is of another one.
        """
        options = self._options
        peers = resolve_initial_peers(options.initial_peers, timeout_s=options.bootstrap_timeout)
        if not peers:
            raise UserError("there is no run to follow: set run.initial_peers to a bootstrap URL or to multiaddrs")
        optimization = Optimization.of(self._module, options.gradient_clip_val, None)
        optimizer = optimization.optimizer
        numel = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
        settings = RunSettings(
            schema_of(self._module), numel, options.target_batch_size, options.compression, type(optimizer).__name__
        )
        self._dht = start_dht(
            peers,
            host_maddrs=options.host_maddrs or DEFAULT_HOST_MADDRS,
            client_mode=options.client_mode,
            startup_timeout_s=options.bootstrap_timeout,
        )
        self._observer = SwarmObserver(self._dht, options.run_id, settings, options.timeout_s, options.record_ttl)
        self._observer.open()
        self._follower = Follower(
            self._module, optimization, self._observer, EpochFiles(self._directory, options.keep_epochs)
        )
        self._follower.recall()

    def close(self) -> None:
        """Leaves the swarm; takes a few seconds at most and may be called at any moment."""
        if self._observer is not None:
            self._observer.close()
            self._observer = None
        if self._dht is not None:
            self._dht.shutdown()
            self._dht = None

    @property
    def trainable_params(self) -> list[torch.nn.Parameter]:
        """The params whose gradients are averaged, in the order in which they are."""
        return self._opened().trainable_params

    @property
    def epoch(self) -> int:
        return self._follower.epoch if self._follower else 0

    @property
    def digest(self) -> str:
        return self._follower.digest if self._follower else ""

    @property
    def num_peers(self) -> int:
        return self._num_peers

    @property
    def caught_up(self) -> bool:
        return self._caught_up

    def advance(self) -> list[Followed]:
        self._num_peers, self._caught_up = 0, False
        try:
            if self._dht is None or not self._dht.is_serving:
                self._reopen()
            followed = self._opened().advance()
        except _FAULTS as error:
            raise SwarmFault(f"the run cannot be followed: {error or type(error).__name__}") from error
        try:
            assert self._observer is not None
            view = self._observer.view()
        except _FAULTS as error:
            logger.warning("the run's peers cannot be read: %s", error or type(error).__name__)
            return followed
        self._num_peers = len(view.peers)
        self._caught_up = bool(view.peers) and view.epoch <= self.epoch
        return followed

    def params(self, epoch: int) -> tuple[str, Mapping[str, torch.Tensor]] | None:
        return self._opened().params(epoch)

    def collect(self, key: str, wanted: Collection[bytes]) -> Records:
        assert self._observer is not None, "advance() comes first"
        try:
            return self._observer.collect(key, wanted, self._options.timeout_s)
        except _FAULTS as error:
            raise SwarmFault(f"the DHT cannot be read: {error or type(error).__name__}") from error

    def publish(self, key: str, subkey: bytes, value: bytes, expires: float) -> bool:
        """Stores a record that a hotkey sealed; returns whether it was taken. Raises SwarmFault."""
        if self._observer is None:
            return False
        try:
            return self._observer.publish(key, subkey, value, expires, self._options.timeout_s)
        except _FAULTS as error:
            raise SwarmFault(f"the DHT cannot be written: {error or type(error).__name__}") from error

    def _reopen(self) -> None:
        logger.warning("the DHT node has ended; joining the swarm again")
        self.close()
        self.open()

    def _opened(self) -> Follower:
        assert self._follower is not None, "open() comes first"
        return self._follower
