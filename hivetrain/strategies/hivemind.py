"""HivemindStrategy: collaborative optimizer steps at a target global batch, over the internet.

Every Lightning batch is one microbatch: its gradient is added to a sum, and the params move only when the swarm as a
whole has gathered ``target_batch_size`` samples. So ``trainer.global_step`` counts microbatches; ``swarm_epoch`` counts
updates.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size

from hivetrain.averaging.collaboration import Collaboration
from hivetrain.averaging.loop import Interrupted
from hivetrain.averaging.options import PeerOptions
from hivetrain.averaging.report import RoundReport
from hivetrain.averaging.settings import RunSettings
from hivetrain.averaging.state import params_digest, schema_of
from hivetrain.averaging.watch import Watchers
from hivetrain.strategies.checks import check_arguments, check_optimization, check_trainer
from hivetrain.strategies.clipping import use_reproducible_norm
from hivetrain.strategies.membership import Membership
from hivetrain.strategies.scaling import unscale
from hivetrain.strategies.schedules import EpochSchedules, SchedulerFn, make_schedulers

logger = logging.getLogger(__name__)

_CHECKPOINT_KEY = "hivemind_strategy"
_WATCHED_UPDATES_MB = 512


class HivemindStrategy(SingleDeviceStrategy):
    """Trains one model together with peers that come and go.

    Nothing touches the network before ``setup`` of a fit; validate, test and predict stay offline. Learning-rate
    schedulers are stepped once per swarm epoch whatever their ``interval`` says. Gradient clipping applies to the
    averaged gradient. Stop at a swarm epoch with :class:`hivetrain.callbacks.StopAtSwarmEpoch`; ``max_steps`` counts
    microbatches.

    Args:
        target_batch_size: samples, over all peers, in one global update.
        run_id: name of the run; peers of different runs never meet.
        initial_peers: where to join: multiaddrs or bootstrap URLs, as a list or a comma-separated string. None: taken
            from the environment variable ``HIVETRAIN_INITIAL_PEERS``; empty: start a new swarm.
        batch_size: samples per microbatch; None: read off each batch.
        matchmaking_time: seconds that a round waits for peers that have not come yet. Longer than a microbatch takes.
        averaging_timeout: seconds after which a round, matchmaking included, is given up.
        on_failed_round: what to do when a round fails. ``retry``: keep the gradient and try again, also after more
            microbatches. ``skip``: give up this epoch's gradient. ``local``: update with the own gradient alone, which
            makes peers diverge until they resynchronise.
        overlap: average one batch's gradient while the next batch is gathered. Gradients are then one update stale, and
            nobody waits for the exchange. Peers of one run may differ in it.
        compression: encoding of exchanged gradients: ``none``, ``fp16``, ``int8`` or ``powersgd(RANK)``. Equal on all
            peers.
        reduction: how gradients become one: ``mean`` (weighted with samples) or ``clipped`` (none counts for more than
            the median norm). Equal on all peers.
        transport: how gradients travel: ``auto`` (direct TLS links where peers can reach each other, else libp2p),
            ``libp2p``, ``direct`` (TLS or the round fails) or ``direct-plain`` (neither encrypted nor authenticated).
        direct_port: TCP port for direct links; 0 picks a free one.
        max_upload_mbit_s: limit on what this peer sends in exchanges, over all members; None: no limit.
        max_samples_per_peer: cap on what one peer counts for; None: a quarter of the target once there are 4 peers.
        record_ttl: seconds after which a peer that fell silent is no longer waited for.
        bandwidth: relative bandwidth of this peer; decides how much it reduces for the others.
        client_mode: this peer cannot be dialled; it reduces nothing for others.
        host_maddrs: where to listen; None: loopback only, a free port.
        announce_maddrs: external addresses to announce.
        identity_path: key file that makes the peer id permanent.
        use_relay: reach peers behind NAT through relays.
        use_auto_relay: look for a relay that makes this peer reachable.
        use_ipfs: find peers through the public IPFS network.
        bootstrap_timeout: seconds to find and join the swarm.
        keep_updates_mb: megabytes of past averaged gradients to keep in memory for validators that follow the run.
            None: 512 where somebody watches this peer's work (``watchers``), else none.
        scheduler_fn: makes a learning-rate scheduler for a module whose ``configure_optimizers`` makes none.
    """

    strategy_name = "hivemind"

    def __init__(
        self,
        target_batch_size: int = 1024,
        run_id: str = "hivetrain",
        initial_peers: list[str] | str | None = None,
        batch_size: int | None = None,
        matchmaking_time: float = 5.0,
        averaging_timeout: float = 60.0,
        on_failed_round: str = "retry",
        overlap: bool = False,
        compression: str = "none",
        reduction: str = "mean",
        transport: str = "auto",
        direct_port: int = 0,
        max_upload_mbit_s: float | None = None,
        max_samples_per_peer: int | None = None,
        record_ttl: float = 30.0,
        bandwidth: float = 1.0,
        client_mode: bool = False,
        host_maddrs: list[str] | None = None,
        announce_maddrs: list[str] | None = None,
        identity_path: str | None = None,
        use_relay: bool = True,
        use_auto_relay: bool = False,
        use_ipfs: bool = False,
        bootstrap_timeout: float = 60.0,
        keep_updates_mb: int | None = None,
        scheduler_fn: SchedulerFn | None = None,
    ) -> None:
        super().__init__()
        check_arguments(
            run_id, on_failed_round, compression, matchmaking_time, averaging_timeout,
            transport, reduction, max_upload_mbit_s, direct_port,
            target_batch_size=target_batch_size, batch_size=batch_size, max_samples_per_peer=max_samples_per_peer,
            record_ttl=record_ttl, bootstrap_timeout=bootstrap_timeout,
        )  # fmt: skip
        self.target_batch_size, self.run_id, self.batch_size = target_batch_size, run_id, batch_size
        self.on_failed_round, self.overlap, self.compression = on_failed_round, overlap, compression
        self.reduction = reduction
        self._scheduler_fn, self._keep_updates_mb = scheduler_fn, keep_updates_mb
        self.watchers = Watchers()  # for callbacks, in their setup
        self._options = PeerOptions(
            run_id, matchmaking_time, averaging_timeout, record_ttl, max_samples_per_peer, bandwidth, client_mode,
            max_upload_mbit_s=max_upload_mbit_s,
        )  # fmt: skip
        dht_options: dict[str, Any] = {
            "announce_maddrs": announce_maddrs,
            "identity_path": identity_path,
            "use_relay": use_relay,
            "use_auto_relay": use_auto_relay,
            "use_ipfs": use_ipfs,
            **({"host_maddrs": host_maddrs} if host_maddrs else {}),
        }
        self._membership = Membership(
            initial_peers, bootstrap_timeout, self._options, dht_options, transport, direct_port
        )
        self.parallel_devices: list[torch.device] = []  # set by the Trainer
        self._collaboration: Collaboration | None = None
        self._restored: dict[str, Any] | None = None
        self._samples_skipped = 0

    @property
    def root_device(self) -> torch.device:
        if len(self.parallel_devices) > 1:
            raise MisconfigurationException(
                f"HivemindStrategy trains on one device per process, got devices={len(self.parallel_devices)}. "
                "Set devices=1 and start one process per device: each is a peer of its own."
            )
        return torch.device(self.parallel_devices[0]) if self.parallel_devices else self._root_device

    @property
    def swarm_epoch(self) -> int:
        """Finished global updates."""
        return self._collaboration.epoch if self._collaboration else 0

    @property
    def rounds(self) -> Sequence[RoundReport]:
        """Every attempt of this fit to make a global update, in order."""
        return tuple(self._collaboration.rounds) if self._collaboration else ()

    @property
    def samples_contributed(self) -> int:
        """Samples of this peer that went into global updates."""
        return self._collaboration.samples_contributed if self._collaboration else 0

    @property
    def samples_dropped(self) -> int:
        """Samples of this peer whose gradients were given up: it fell behind, or the policy said so."""
        return self._collaboration.samples_dropped if self._collaboration else 0

    @property
    def samples_skipped(self) -> int:
        """Samples of this fit whose gradient was not finite and so was left out."""
        return self._samples_skipped

    @property
    def peer_id(self) -> str | None:
        """This peer's libp2p identity, base58; None outside a fit."""
        return self._membership.peer.peer_id if self._membership.peer else None

    @property
    def num_peers(self) -> int:
        """Live peers of this run, this one included; 0 outside a fit."""
        return len(self._membership.peer.view().peers) if self._membership.peer else 0

    @property
    def samples_accumulated(self) -> int:
        """Samples that the whole swarm has gathered towards the next global update, as last heard."""
        peer = self._membership.peer
        return peer.view().samples(self.swarm_epoch) if peer else 0

    @property
    def averaging_timeout(self) -> float:
        """Seconds after which a round is given up."""
        return self._options.averaging_timeout_s

    @property
    def visible_maddrs(self) -> list[str]:
        """Addresses at which others can join through this peer."""
        return list(self._membership.maddrs)

    @property
    def held_digest(self) -> str:
        """Digest of the params of :attr:`swarm_epoch`, as computed when they were reached; "" outside a fit."""
        return self._collaboration.held.digest if self._collaboration else ""

    @property
    def trainable_params(self) -> list[torch.nn.Parameter]:
        """The params whose gradients are averaged, in the order in which they are; empty outside a fit."""
        return self._collaboration.accumulator.params if self._collaboration else []

    def publish(self, key: str, subkey: bytes, value: bytes, expires: float, timeout_s: float = 5.0) -> bool:
        """Stores a record that a hotkey sealed in the DHT; returns whether it was taken. Safe on any thread."""
        peer = self._membership.peer
        return peer is not None and peer.publish(key, subkey, value, expires, timeout_s)

    def publish_own(self, key: str, value: bytes, expires: float, timeout_s: float = 5.0) -> bool:
        """Stores a record that only this peer can write in the DHT; returns whether it was taken. On any thread."""
        peer = self._membership.peer
        return peer is not None and peer.publish_own(key, value, expires, timeout_s)

    def collect(self, key: str, timeout_s: float = 5.0) -> dict[bytes, tuple[bytes, float]]:
        """Reads the records that hotkeys sealed: subkey -> (record, expiration); raises TimeoutError. On any thread."""
        peer = self._membership.peer
        return peer.collect(key, timeout_s) if peer is not None else {}

    def retire(self) -> None:
        """Trains no more, and serves what it holds until ``teardown``; the others do not wait for this peer."""
        if self._membership.peer is not None:
            self._membership.peer.retire()

    def params_digest(self) -> str:
        """SHA-256 of the params, hex: equal on two peers if and only if their params are bit-identical."""
        assert self.lightning_module is not None
        return params_digest(self.lightning_module)

    def setup(self, trainer: Trainer) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return super().setup(trainer)
        check_trainer(trainer)
        super().setup(trainer)
        assert self.lightning_module is not None
        check_optimization(self.lightning_module, self.optimizers, self.lr_scheduler_configs)
        self.lr_scheduler_configs = make_schedulers(self.lr_scheduler_configs, self._scheduler_fn, self.optimizers[0])
        schedules = EpochSchedules(self.lr_scheduler_configs, self.optimizers[0], self.lightning_module)
        self._schedules = schedules
        use_reproducible_norm(self.precision_plugin)
        self._trainer, self._batch_samples, self._samples_skipped = trainer, 0, 0
        self._collaboration = Collaboration(
            self.lightning_module,
            self.optimizers[0],
            target_batch_size=self.target_batch_size,
            policy=self.on_failed_round,
            matchmaking_time_s=self._options.matchmaking_time_s,
            averaging_timeout_s=self._options.averaging_timeout_s,
            overlap=self.overlap,
            compression=self.compression,
            on_epoch=schedules.follow,
            on_report=self._log_metrics,
            watchers=self.watchers,
            keep_updates_bytes=self._keep_updates_bytes(),
        )
        if self._restored is not None:  # now: callbacks ask for the epoch before on_train_start reaches a strategy
            self._collaboration.load_state_dict(self._restored)
            schedules.restored(self._collaboration.epoch)
        self._join(self._collaboration)
        return None

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self._collaboration is not None
        assert self._membership.peer is not None
        if self._restored is None:
            self._schedules.rewind()  # a checkpoint that is not of a swarm has counted steps of its own
        self._collaboration.begin(self._membership.peer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._batch_samples = self.batch_size or extract_batch_size(batch)

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs one microbatch; makes a global update if the swarm's batch is full."""
        loss = closure()
        assert self._collaboration is not None

        def step() -> None:  # the precision plugin calls hooks, clips, and steps, on the averaged gradient
            # The plain step, whatever the precision: the gradients are unscaled already.
            assert self.lightning_module is not None
            Precision.optimizer_step(
                self.precision_plugin, optimizer, model=self.lightning_module, closure=lambda: loss, **kwargs
            )

        if loss is not None:  # None: training_step skipped the batch
            if unscale(self.precision_plugin, optimizer):
                self._collaboration.add(self._batch_samples)
            else:
                self._samples_skipped += self._batch_samples
                self.watchers.on_skipped(self._batch_samples)
                logger.warning("skipped a microbatch: its gradient is not finite")
        try:
            self._collaboration.advance(step)
        except Interrupted:
            logger.info("asked to end while waiting for the swarm; the gradient was not applied")
        return loss

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self._collaboration is not None:
            checkpoint = {**checkpoint, _CHECKPOINT_KEY: self._collaboration.state_dict()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self._restored = checkpoint.get(_CHECKPOINT_KEY)
        return checkpoint

    def teardown(self) -> None:
        """Leaves the swarm; takes a few seconds at most and may be called at any moment."""
        if self._collaboration is not None:
            self._collaboration.end()
        self._membership.close()
        self._restored = None  # a checkpoint is for the run that it was loaded for
        super().teardown()

    def _keep_updates_bytes(self) -> int:
        megabytes = self._keep_updates_mb
        return (_WATCHED_UPDATES_MB if self.watchers else 0) * 10**6 if megabytes is None else megabytes * 10**6

    def _join(self, collaboration: Collaboration) -> None:
        assert self.lightning_module is not None
        settings = RunSettings(
            schema_of(self.lightning_module),
            collaboration.accumulator.numel,
            self.target_batch_size,
            self.compression,
            type(self.optimizers[0]).__name__,
            self.reduction,
        )
        self._membership.open(
            settings,
            collaboration.compressor.codec,
            collaboration.held,
            lambda: bool(self._trainer.received_sigterm),
        )

    def _log_metrics(self, report: RoundReport) -> None:
        failed = sum(not past.committed for past in self.rounds)
        metrics = report.metrics() | {"swarm/num_peers": self.num_peers, "swarm/rounds_failed": failed}
        for sink in self._trainer.loggers:
            sink.log_metrics(metrics, step=self._trainer.global_step)
