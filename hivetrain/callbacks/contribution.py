"""A miner's place in the incentive network: its uid, its data, its records and their audits.

Surprising fact: Lightning ends the strategy, and with it the DHT, before it calls a callback's ``teardown``. So reveals
that are still owed are waited for at the end of training, and an interrupted miner owes them for ever.
"""

import logging
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from hivetrain.averaging.watch import RoundWatcher
from hivetrain.callbacks.audited_work import AuditedWork
from hivetrain.callbacks.beacon_clock import BeaconClock
from hivetrain.callbacks.replayable import check_dropout, check_replayable
from hivetrain.callbacks.work_counts import WorkCounts
from hivetrain.chain.address import open_chain
from hivetrain.chain.base import Chain, Code, LedgerError, Snapshot
from hivetrain.contribution.rules import AuditRules
from hivetrain.errors import UserError
from hivetrain.keys import DEFAULT_WALLET_PATH, Hotkey, Wallet

logger = logging.getLogger(__name__)

_MIN_LIFETIME_S, _MAX_LIFETIME_S = 120.0, 3600.0
_RETRY_S = 1.0


class ContributionPublisher(Callback):
    """Commits to this miner's work before each exchange, and reveals what the beacon draws, so that it can be paid.

    The hotkey must be registered. Its uid is the slot of the data that it trains on. Records go through the strategy's
    DHT, so the miner needs no server of its own. Under ``chain/`` the loggers get :attr:`counts`.

    Args:
        chain: a ledger file, ``http://HOST:PORT[#SERVER_HOTKEY]``, or ``bittensor:NETWORK/NETUID``.
        wallet: name of the wallet.
        hotkey: name of its hotkey, which signs the records.
        wallet_path: directory of all wallets.
        rules: of the run's audits; None takes the defaults. The same for all miners and validators of a run.
        publish_timeout_s: longest wait for the DHT before an exchange, which others may be waiting for.
        chain_timeout_s: longest wait for the chain at the start.
    """

    work_class: type[AuditedWork] = AuditedWork

    def __init__(
        self,
        chain: str,
        wallet: str = "default",
        hotkey: str = "default",
        wallet_path: str = DEFAULT_WALLET_PATH,
        rules: AuditRules | None = None,
        publish_timeout_s: float = 5.0,
        chain_timeout_s: float = 60.0,
    ) -> None:
        if publish_timeout_s <= 0 or chain_timeout_s <= 0:
            raise UserError("contribute.publish_timeout_s and contribute.chain_timeout_s must be positive")
        self.chain = chain
        self.wallet = Wallet(wallet, hotkey, wallet_path)
        self.rules = rules or AuditRules()
        self.publish_timeout_s = publish_timeout_s
        self.chain_timeout_s = chain_timeout_s
        self.uid: int | None = None
        self.counts = WorkCounts()
        self._work: AuditedWork | None = None
        self._clock: BeaconClock | None = None
        self._watcher: RoundWatcher | None = None
        self._block_time_s = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be audited, find the own uid, and begin to watch chain and strategy."""
        if stage != "fit":
            return
        check_replayable(trainer, pl_module)
        hotkey = self.wallet.load()
        chain = open_chain(self.chain, hotkey)
        try:
            view = self._look(chain)
            self.uid = self._own_uid(view, hotkey)
            self._take_slot(trainer, self.uid)
        except BaseException:
            chain.close()
            raise
        self.counts, self._block_time_s = WorkCounts(), view.rules.block_time_s
        self._clock = BeaconClock(chain, self.rules, self._block_time_s, self.counts)
        self._clock.start(view.block)
        lifetime_s = min(max(3 * self._reveal_s(), _MIN_LIFETIME_S), _MAX_LIFETIME_S)
        strategy: Any = trainer.strategy
        self._check_beacon(strategy.averaging_timeout)
        self._work = self.work_class(
            strategy,
            trainer.datamodule,  # type: ignore[attr-defined]
            hotkey,
            self.rules,
            str(trainer.precision),
            self._clock,
            self.counts,
            self.publish_timeout_s,
            lifetime_s,
        )
        self._watcher = _Metrics(trainer, self)
        strategy.watchers += [self._work, self._watcher]
        logger.info("hotkey %s mines as uid %d on %s", hotkey.address, self.uid, self.chain)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again: ``configure_model`` may have built layers since."""
        check_dropout(pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Keep the microbatch's loss, without the factor that fp16 needs."""
        assert self._work is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._work.loss = loss.detach() / (scaler.get_scale() if scaler is not None else 1.0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the beacons of what was committed, and reveal: a drawn miner that is gone forfeits its pay."""
        assert self._clock is not None
        if not self._clock.is_settled:
            trainer.strategy.retire()  # type: ignore[attr-defined]
            logger.info("training is over; waiting for the beacons of the last contributions")
            self._clock.wait_settled(self._reveal_s() + 2, lambda: bool(trainer.received_sigterm))
        self._log_metrics(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop at once."""
        self.release(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self.release(trainer, pl_module)

    def release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of chain and strategy; may be called twice."""
        watchers = getattr(trainer.strategy, "watchers", [])
        for watcher in (self._work, self._watcher):
            if watcher in watchers:
                watchers.remove(watcher)
        if self._clock is not None:
            self._clock.stop()

    def _reveal_s(self) -> float:
        """Seconds from a commitment to the last moment at which it may be revealed."""
        return (self.rules.beacon_lag + self.rules.reveal_blocks) * self._block_time_s

    def _check_beacon(self, averaging_timeout_s: float) -> None:
        blind_s = self.rules.blind_blocks * self._block_time_s
        if 0 < blind_s < averaging_timeout_s:
            logger.warning(
                "a beacon may be known %.0f s after a commitment, within an exchange of up to %.0f s: peers could "
                "leave when they are drawn; raise rules.beacon_lag or lower averaging_timeout, on all peers",
                blind_s, averaging_timeout_s,
            )  # fmt: skip

    def _look(self, chain: Chain) -> Snapshot:
        deadline = time.monotonic() + self.chain_timeout_s
        while True:
            try:
                return chain.snapshot(max(1.0, deadline - time.monotonic()))
            except LedgerError as error:
                if error.code is not Code.UNREACHABLE or time.monotonic() + _RETRY_S > deadline:
                    raise UserError(f"contribute.chain: {error}") from error
                threading.Event().wait(_RETRY_S)

    def _own_uid(self, view: Snapshot, hotkey: Hotkey) -> int:
        neuron = view.neuron(hotkey.address)
        if neuron is None:
            wallet = self.wallet
            raise UserError(
                f"hotkey {hotkey.address} is not registered, so nobody could pay it: hivetrain chain register "
                f"--chain {self.chain} --wallet {wallet.name} --hotkey {wallet.hotkey} --wallet-path {wallet.path}"
            )
        return neuron.uid

    def _take_slot(self, trainer: Trainer, uid: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        n_slots = data.assignment.n_slots
        if uid >= n_slots:
            raise UserError(
                f"uid {uid} has no data: there are {n_slots} slots. Raise data.n_slots above every uid, on all peers "
                "of the run, with a corpus that has as many units"
            )
        if data.slot not in (None, uid):
            raise UserError(f"data.slot is {data.slot}, but the hotkey's uid is {uid}: leave data.slot out")
        data.slot = uid

    def _log_metrics(self, trainer: Trainer) -> None:
        for sink in trainer.loggers:
            sink.log_metrics(self.counts.metrics(), step=trainer.global_step)


class _Metrics(RoundWatcher):
    """Logs the publisher's counts after each update; it stands behind the work in the list, which counts first."""

    def __init__(self, trainer: Trainer, publisher: ContributionPublisher) -> None:
        self._trainer, self._publisher = trainer, publisher

    def on_update(self, report: Any) -> None:
        self._publisher._log_metrics(self._trainer)
