"""BittensorChain: the interface of base.py over the Bittensor SDK, version 11.

Surprising fact: the SDK does not raise when a transaction fails and does not check permit or version before it signs.
Both are settled here, so that a validator learns the reason in one place and pays no fee for a sure refusal.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any

import bittensor as bt
from bittensor.settings import resolve_endpoint

from hivetrain.chain.base import Chain, Code, Deadline, LedgerError, Neuron, Outcome, Receipt, Snapshot, Weights
from hivetrain.chain.bittensor_session import Progress, Session, Sessions, connect_to
from hivetrain.chain.pallet import RAO, RULE_ITEMS, neuron_from_metagraph, rules_from_storage
from hivetrain.chain.weights import check_endpoint, check_row, parse_weights, split_registered, to_u16
from hivetrain.keys import Hotkey, Wallet

CLOCK_S = 0.4
POOL_RETRIES = 2
_WRITE: dict[str, Any] = {"wait_for_finalization": False, "retries": POOL_RETRIES}


class BittensorChain(Chain):
    """A subnet of Bittensor as seen by one hotkey.

    Args:
        network: ``finney``, ``test``, ``local`` or a ws:// or wss:// URL.
        netuid: the subnet.
        wallet: who acts; registration needs a wallet with a coldkey.
        registration_limit_tao: the most that a registration may cost; None forbids it.
        confirm: asked with the current cost in TAO before a registration; None forbids it.
        coldkey_password: opens an encrypted coldkey for a registration.
        substrate: makes the chain access, such as a fake for tests; None connects to the network.
        poll_s: seconds between looks at the chain while waiting.
        jitter: random numbers from 0 to 1, so that many clients do not reconnect at once.

    Raises:
        ValueError: there is no such network.
    """

    def __init__(
        self,
        network: str,
        netuid: int,
        wallet: Wallet | Hotkey,
        *,
        registration_limit_tao: float | None = None,
        confirm: Callable[[float], bool] | None = None,
        coldkey_password: str | None = None,
        substrate: Callable[[], Any] | None = None,
        poll_s: float = 1.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        if substrate is None:
            resolve_endpoint(network)
        self._network = network
        self._netuid = netuid
        self._wallet = wallet
        self._limit_tao = registration_limit_tao
        self._confirm = confirm
        self._coldkey_password = coldkey_password
        self._sessions = Sessions(network, substrate or (lambda: connect_to(network)), jitter)
        self._poll_s = poll_s
        self._key: Hotkey | None = None

    @property
    def hotkey(self) -> str:
        return self._signer().address

    def snapshot(self, timeout_s: float) -> Snapshot:
        return self._sessions.call(self._read, timeout_s)

    def register(self, timeout_s: float) -> Receipt:
        """Take a uid for money. The deadline covers the chain's part, not the time a person takes to confirm."""
        snapshot = self.snapshot(timeout_s)
        me = snapshot.neuron(self.hotkey)
        if me is not None:
            return Receipt(Outcome.APPLIED, snapshot.block, detail=f"was registered already, uid {me.uid}")
        coldkey = self._permitted_coldkey(snapshot)
        call = bt.calls.SubtensorModule.register_limit(
            netuid=self._netuid, hotkey=self.hotkey, limit_price=int((self._limit_tao or 0) * RAO)
        )

        async def work(session: Session, progress: Progress) -> Receipt:
            sending = session.client.submit_call(call, coldkey, signer="coldkey", wait_for_finalization=False)
            return await session.send(sending, progress)

        return self._write(work, timeout_s, lambda neuron, _: True)

    def publish(self, ip: str, port: int, timeout_s: float) -> Receipt:
        ip = check_endpoint(ip, port, allow_loopback=False)
        intent = bt.ServeAxon(netuid=self._netuid, ip=ip, port=port)

        async def work(session: Session, progress: Progress) -> Receipt:
            self._registered(await self._read(session))
            return await session.send(session.client.execute(intent, self._signer().keypair, **_WRITE), progress)

        return self._write(work, timeout_s, lambda neuron, _: (neuron.ip, neuron.port) == (ip, port))

    def submit_weights(self, weights: Weights, version_key: int, timeout_s: float) -> Receipt:
        parsed = parse_weights(weights)

        async def work(session: Session, progress: Progress) -> Receipt:
            return await self._submit(session, progress, parsed, version_key)

        return self._write(work, timeout_s, lambda neuron, before: neuron.last_update > before)

    def wait_block(self, block: int, timeout_s: float) -> int:
        deadline = Deadline(timeout_s, time.monotonic)
        while True:
            # Reading gets a little time of its own, so that a short wait still learns the current block.
            current = int(self._sessions.call(lambda session: session.client.block(), deadline.left_s() + CLOCK_S))
            if current >= block or deadline.left_s() <= 0:
                return current
            self._sessions.pause(min(deadline.left_s(), self._poll_s))

    def block_hash(self, block: int, timeout_s: float) -> str | None:
        async def work(session: Session) -> str | None:
            if block > await session.client.block():
                return None
            return str(await session.substrate.block_hash(block))

        return self._sessions.call(work, timeout_s)

    def weights(self, timeout_s: float) -> dict[str, dict[str, float]]:
        async def work(session: Session) -> dict[str, dict[str, float]]:
            view = await session.client.at()
            graph, rows = await asyncio.gather(
                view.subnets.metagraph(self._netuid, commitments=False), view.read("weights", netuid=self._netuid)
            )
            if graph is None:
                raise LedgerError(Code.INCOMPATIBLE, f"there is no subnet {self._netuid} on {self._network}")
            return _named_rows({row.uid: row for row in graph.neurons}, rows)

        return self._sessions.call(work, timeout_s)

    def close(self) -> None:
        self._sessions.close()

    # Reads and writes, on the session's loop

    async def _read(self, session: Session) -> Snapshot:
        view = await session.client.at()
        storage = [
            view.query(("SubtensorModule", item), [] if item == "StakeThreshold" else [self._netuid])
            for item in RULE_ITEMS
        ]
        graph, block_hash, next_epoch, block_time, *values = await asyncio.gather(
            view.subnets.metagraph(self._netuid, commitments=False),
            session.substrate.block_hash(view.block),
            view.read("next_epoch_start_block", netuid=self._netuid),
            view.block_time(),
            *storage,
        )
        if graph is None:
            raise LedgerError(Code.INCOMPATIBLE, f"there is no subnet {self._netuid} on {self._network}")
        facts = {**dict(zip(RULE_ITEMS, values, strict=True)), "owner": graph.owner_hotkey, "block_time": block_time}
        rules = rules_from_storage(facts)
        neurons = tuple(neuron_from_metagraph(row) for row in graph.neurons)
        epoch = view.block + rules.tempo if next_epoch is None else int(next_epoch)
        return Snapshot(view.block, str(block_hash), epoch, rules, neurons)

    async def _submit(
        self, session: Session, progress: Progress, weights: dict[str, float], version_key: int
    ) -> Receipt:
        snapshot = await self._read(session)
        rules, me = snapshot.rules, self._registered(snapshot)
        if me.stake < rules.stake_threshold:
            raise LedgerError(Code.LOW_STAKE, f"stake {me.stake:g} is below {rules.stake_threshold:g}: add stake")
        if version_key < rules.version_key:
            raise LedgerError(Code.STALE_VERSION, f"version {version_key} is below {rules.version_key}: update")
        wait = me.last_update + rules.rate_limit - snapshot.block
        if wait > 0:
            raise LedgerError(Code.RATE_LIMITED, "weights, or the registration, are too recent", wait)
        if not me.permit:
            raise LedgerError(Code.NO_PERMIT, f"no validator permit under {rules.consensus} consensus")
        kept, dropped = split_registered(weights, {neuron.hotkey: neuron.uid for neuron in snapshot.neurons})
        row = to_u16(kept, rules.max_weight_share)
        check_row(row, rules, me.uid, {neuron.uid for neuron in snapshot.neurons})
        outcome = Outcome.COMMITTED if rules.commit_reveal else Outcome.APPLIED
        progress.before, progress.receipt = me.last_update, Receipt(outcome, None, dropped)
        intent = bt.SetWeights(netuid=self._netuid, weights=dict(row), version_key=version_key)
        return await session.send(session.client.execute(intent, self._signer().keypair, **_WRITE), progress)

    def _permitted_coldkey(self, snapshot: Snapshot) -> Any:
        """The key that pays for a registration, after everything that can forbid one was asked."""
        cost = snapshot.rules.registration_cost
        if not snapshot.rules.registration_open:
            raise LedgerError(Code.CLOSED, "registration is closed on this subnet")
        if self._limit_tao is None or self._confirm is None or not isinstance(self._wallet, Wallet):
            raise LedgerError(Code.CLOSED, f"registration costs {cost:g} TAO now: give a wallet, a limit and consent")
        if cost > self._limit_tao:
            raise LedgerError(Code.FUNDS, f"registration costs {cost:g} TAO, above the limit of {self._limit_tao:g}")
        coldkey = self._wallet.load_coldkey(self._coldkey_password)
        if not self._confirm(cost):
            raise LedgerError(Code.CLOSED, "the registration was not confirmed")
        return coldkey

    def _registered(self, snapshot: Snapshot) -> Neuron:
        me = snapshot.neuron(self.hotkey)
        if me is None:
            raise LedgerError(Code.NOT_REGISTERED, f"{self.hotkey} holds no uid: run hivetrain chain register")
        return me

    def _signer(self) -> Hotkey:
        if self._key is None:
            self._key = self._wallet.load() if isinstance(self._wallet, Wallet) else self._wallet
        return self._key

    def _write(
        self,
        work: Callable[[Session, Progress], Coroutine[Any, Any, Receipt]],
        timeout_s: float,
        landed: Callable[[Neuron, int], bool],
    ) -> Receipt:
        """Do a write; when its answer is lost, look at the chain until the deadline instead of sending again.

        ``landed`` tells from this hotkey's neuron, and the block of its last update before, whether it took place.
        """
        deadline, progress = Deadline(timeout_s, time.monotonic), Progress()
        try:
            return self._sessions.call(lambda session: work(session, progress), timeout_s, progress)
        except LedgerError as error:
            if not progress.sent or error.code != Code.UNREACHABLE:
                raise
            reason = error.message
        receipt = progress.receipt
        while deadline.left_s() > 0:
            try:
                me = self.snapshot(deadline.left_s()).neuron(self.hotkey)
                if me is not None and landed(me, progress.before):
                    return Receipt(receipt.outcome, None, receipt.dropped, "found on the chain")
                self._sessions.pause(min(deadline.left_s(), self._poll_s))
            except LedgerError:
                break
        return Receipt(Outcome.UNKNOWN, None, receipt.dropped, reason)


def _named_rows(neurons: dict[int, Any], rows: dict[int, dict[int, float]]) -> dict[str, dict[str, float]]:
    """Rows by hotkey, without those for whom the row is not meant: neurons registered after it was set."""
    named: dict[str, dict[str, float]] = {}
    for uid, row in rows.items():
        if uid not in neurons:
            continue
        since = neurons[uid].last_update
        meant = {m: w for m, w in row.items() if m in neurons and since > neurons[m].block_at_registration}
        total = sum(meant.values())
        if total:
            named[neurons[uid].hotkey] = {neurons[m].hotkey: w / total for m, w in meant.items()}
    return named
