"""Brings a tempo's weights onto the chain.

Surprising fact: a call whose answer was lost is not a failure. That the weights are on their way is written down before
the call, and after a lost answer, or a crash, the chain is read before anything is sent again. And when nobody has
earned anything, weights may have to be sent all the same: the chain pays by the last ones until others come.
"""

import logging

from hivetrain.chain.base import Chain, Code, LedgerError, Neuron, Outcome, Receipt, Snapshot
from hivetrain.validator.state import State
from hivetrain.validator.tempos import UNFINISHED, Status, Tempo, Tempos
from hivetrain.validator.watch import ValidatorWatcher

logger = logging.getLogger(__name__)

_LANDING_BLOCKS = 3  # a lost call may still arrive within these
_SAME_SHARE = 1e-3


class Submission:
    """One step at a time; what it knows is in the state.

    Args:
        chain: where the weights go.
        state: for transactions.
        tempos: in that state.
        version_key: version of the scoring rules.
        most_attempts: how often the weights of one tempo are sent.
        timeout_s: limit for one call.
        watcher: told what became of weights.
    """

    def __init__(
        self, chain: Chain, state: State, tempos: Tempos, version_key: int, most_attempts: int, timeout_s: float,
        watcher: ValidatorWatcher,
    ) -> None:  # fmt: skip
        self._watcher = watcher
        self._chain, self._state, self._tempos = chain, state, tempos
        self._version_key, self._most_attempts, self._timeout_s = version_key, most_attempts, timeout_s

    def step(self, view: Snapshot) -> None:
        """Sends the weights of the last tempo, if they wait and may be sent now."""
        tempo = self._tempos.latest()
        if tempo is None or tempo.status not in UNFINISHED:
            return
        me = view.neuron(self._chain.hotkey)
        if me is None:
            self._put_off(tempo, f"hotkey {self._chain.hotkey} is not registered")
        elif tempo.status is Status.SENDING and not self._is_lost(tempo, me, view):
            pass
        elif not me.permit:
            reason = f"hotkey {me.hotkey} has no validator permit; the next epoch may grant it to enough stake"
            self._put_off(tempo, reason)
        elif view.block < max(tempo.retry_block, me.last_update + view.rules.rate_limit):
            pass
        elif tempo.attempts >= self._most_attempts:
            self._settle(tempo, Status.FAILED, f"given up after {tempo.attempts} attempts: {tempo.receipt}")
        elif not tempo.weights and not self._pays_somebody(tempo):
            self._settle(tempo, Status.EMPTY, "nobody has earned anything")
        else:
            self._send(tempo, me, view)

    def _is_lost(self, tempo: Tempo, me: Neuron, view: Snapshot) -> bool:
        """Whether weights that were on their way have not arrived and will not."""
        assert tempo.sent_block is not None
        assert tempo.sent_after is not None
        if me.last_update > tempo.sent_after:
            status = Status.SEALED if view.rules.commit_reveal else Status.SET
            self._settle(tempo, status, f"read back: the chain has weights of block {me.last_update}")
            return False
        if not view.rules.commit_reveal:
            row, sent = self._chain.weights(self._timeout_s).get(me.hotkey, {}), self._row(tempo)
            if all(abs(row.get(name, 0) - sent.get(name, 0)) < _SAME_SHARE for name in {*row, *sent}):
                self._settle(tempo, Status.SET, "read back: the chain has these weights")
                return False
        return view.block >= tempo.sent_block + _LANDING_BLOCKS

    def _row(self, tempo: Tempo) -> dict[str, float]:
        """What is sent for a tempo. A validator's weight on itself pays nobody, and chains always take it."""
        return tempo.weights or {self._chain.hotkey: 1.0}

    def _pays_somebody(self, tempo: Tempo) -> bool:
        """Whether weights of ours from before a tempo pay somebody, or will once the chain reveals them."""
        if self._tempos.sent_before(tempo.block):
            return True
        return bool(self._chain.weights(self._timeout_s).get(self._chain.hotkey, {}).keys() - {self._chain.hotkey})

    def _send(self, tempo: Tempo, me: Neuron, view: Snapshot) -> None:
        with self._state.transaction():
            self._tempos.begin_sending(tempo, view.block, me.last_update)
        try:
            receipt = self._chain.submit_weights(self._row(tempo), self._version_key, self._timeout_s)
        except LedgerError as error:
            if error.code is Code.CLOSED:
                raise
            wait = error.retry_after_blocks or 2 ** (tempo.attempts + 1)
            self._settle(tempo, Status.PENDING, str(error), view.block + wait)
            return
        if receipt.outcome is Outcome.UNKNOWN:
            logger.warning("weights of tempo %d: sent, but the answer was lost; the chain is read next", tempo.block)
            return
        text = _text(receipt) + ("" if tempo.weights else "; they pay nobody, as nobody has earned anything")
        self._settle(tempo, Status.SEALED if receipt.outcome is Outcome.COMMITTED else Status.SET, text)

    def _put_off(self, tempo: Tempo, reason: str) -> None:
        if tempo.receipt != reason:  # said once
            self._settle(tempo, tempo.status, reason, tempo.retry_block)

    def _settle(self, tempo: Tempo, status: Status, receipt: str, retry_block: int = 0) -> None:
        with self._state.transaction():
            self._tempos.settle(tempo, status, receipt, retry_block)
        self._watcher.weighed(str(status), len(tempo.weights))
        done = status in (Status.SET, Status.SEALED, Status.EMPTY)
        log = logger.info if done else logger.error if status is Status.FAILED else logger.warning
        log("weights of tempo %d: %s: %s", tempo.block, status if done else f"not set ({status})", receipt)


def _text(receipt: Receipt) -> str:
    dropped = f"; left out, no longer registered: {', '.join(receipt.dropped)}" if receipt.dropped else ""
    return f"{receipt.outcome} in block {receipt.block}{dropped}{' ' if receipt.detail else ''}{receipt.detail}"
