"""The chain's time beside training: which block it is, and whom the beacons draw.

Surprising fact: nothing here can stop training. While the chain does not answer, ``block`` is None and reveals wait;
what they lead to is that work goes unpaid, which is counted.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hivetrain.callbacks.work_counts import WorkCounts
from hivetrain.chain.base import Chain, Code, LedgerError
from hivetrain.contribution.beacon import beacon_block, draw
from hivetrain.contribution.record import Contribution
from hivetrain.contribution.rules import AuditRules

logger = logging.getLogger(__name__)

_CALL_S = 10.0
_MAX_RETRY_S = 30.0
_MAX_EXPECTED = 64
_HAND_MADE_FRESH_S = 10.0  # where blocks come only when an operator makes them

Reveal = Callable[[tuple[int, ...]], bool]


@dataclass(frozen=True)
class _Expected:
    contribution: Contribution
    beacon: int
    reveal: Reveal


class BeaconClock:
    """Watches a chain in a thread of its own and has drawn leaves revealed.

    Args:
        chain: closed by :meth:`stop`, which is what ends a wait for it.
        rules: of the run's audits.
        block_time_s: seconds from block to block; 0 where an operator makes them.
        counts: where audits, reveals and outages are counted.
    """

    def __init__(self, chain: Chain, rules: AuditRules, block_time_s: float, counts: WorkCounts) -> None:
        self._chain, self._rules, self._block_time_s, self._counts = chain, rules, block_time_s, counts
        self._poll_s = min(6.0, max(1.0, block_time_s / 2))  # a chain may take a while to answer
        self._changed = threading.Condition()
        self._expected: list[_Expected] = []
        self._block: int | None = None
        self._read_at = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beacon-clock", daemon=True)

    @property
    def block(self) -> int | None:
        """The current block; None if it was last read more than two block times ago."""
        with self._changed:
            fresh_s = max(2 * self._block_time_s, 1.0) if self._block_time_s else _HAND_MADE_FRESH_S
            return self._block if time.monotonic() - self._read_at <= fresh_s else None

    @property
    def is_settled(self) -> bool:
        """Whether every contribution expected so far has been drawn or not, and revealed if it was."""
        with self._changed:
            return not self._expected

    def start(self, block: int) -> None:
        """Starts to watch; ``block`` was read just now."""
        self._saw(block)
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Ends the thread and closes the chain; may be called twice."""
        self._stopped.set()
        self._chain.close()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        with self._changed:
            if self._expected:
                logger.warning("%d contributions were left before their beacon or reveal", len(self._expected))
            self._expected = []

    def expect(self, contribution: Contribution, reveal: Reveal) -> None:
        """Has a published contribution drawn when its beacon block exists.

        Args:
            contribution: as it was published.
            reveal: called with the drawn leaves, on the clock's thread, until it returns true or it is too late.
        """
        with self._changed:
            if len(self._expected) == _MAX_EXPECTED:  # the chain has been silent for long
                self._expected.pop(0)
                self._counts.reveals_missed += 1
            self._expected.append(_Expected(contribution, beacon_block(contribution, self._rules), reveal))

    def wait_settled(self, timeout_s: float, give_up: Callable[[], bool]) -> bool:
        """Waits until all that is expected is settled; ``give_up`` is asked several times a second."""
        deadline = time.monotonic() + timeout_s
        while not self.is_settled and time.monotonic() < deadline and not give_up() and self._thread.is_alive():
            with self._changed:
                self._changed.wait(0.1)
        return self.is_settled

    def _run(self) -> None:
        retry_s, failing = self._poll_s, False
        while not self._stopped.is_set():
            try:
                self._saw(self._chain.wait_block((self._block or 0) + 1, self._poll_s))
                self._settle()
            except LedgerError as error:
                if error.code is Code.CLOSED or self._stopped.is_set():
                    return
                if not failing:
                    self._counts.chain_outages += 1
                    logger.warning("the chain does not answer (%s); training goes on, unpaid meanwhile", error)
                failing = True
                self._stopped.wait(retry_s)
                retry_s = min(2 * retry_s, _MAX_RETRY_S, max(self._block_time_s, 1.0))
                continue
            if failing:
                logger.info("the chain answers again, at block %d", self._block)
            retry_s, failing = self._poll_s, False

    def _saw(self, block: int) -> None:
        with self._changed:
            self._block, self._read_at = block, time.monotonic()
            self._changed.notify_all()

    def _settle(self) -> None:
        assert self._block is not None
        with self._changed:
            due = [expected for expected in self._expected if expected.beacon <= self._block]
        for expected in due:
            if self._stopped.is_set():
                return
            if self._is_done(expected, self._block > expected.beacon + self._rules.reveal_blocks):
                with self._changed:
                    if expected in self._expected:
                        self._expected.remove(expected)
                    self._changed.notify_all()

    def _is_done(self, expected: _Expected, is_late: bool) -> bool:
        """Draws and reveals. Returns whether nothing is left to do."""
        work = expected.contribution
        drawn = self._draw(expected)
        if drawn == ():
            return True
        if drawn is not None and not is_late and self._has_revealed(expected, drawn):
            self._counts.audits_drawn += 1
            self._counts.reveals_published += 1
            logger.info("audit: revealed leaves %s of the contribution of swarm epoch %d", drawn, work.swarm_epoch)
            return True
        if is_late:
            self._counts.audits_drawn += drawn is not None
            self._counts.reveals_missed += 1
            logger.warning("the contribution of swarm epoch %d could not be revealed in time", work.swarm_epoch)
        return is_late

    def _draw(self, expected: _Expected) -> tuple[int, ...] | None:
        """The drawn leaves; None if the beacon is not known."""
        work = expected.contribution
        beacon = self._chain.block_hash(expected.beacon, _CALL_S)
        if beacon is None:
            return None
        try:
            return draw(beacon, work.run_id, work.swarm_epoch, work.hotkey, work.microbatches, self._rules)
        except ValueError as error:
            logger.warning("the chain gave no hash of block %d: %s", expected.beacon, error)
            return None

    def _has_revealed(self, expected: _Expected, drawn: tuple[int, ...]) -> bool:
        try:
            return expected.reveal(drawn)
        except Exception:  # the thread's boundary; tried again until it is too late
            if not self._stopped.is_set():
                logger.exception("a reveal failed")
            return False
