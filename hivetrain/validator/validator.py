"""The validator: reads what miners committed to, judges it, pays for it.

Surprising fact: no round takes a decision that depends on when it happens to run. Which block a thing was seen in, and
what follows from that, is in the state file, so rounds may be missed, repeated or cut short.
"""

import logging
import time
from collections.abc import Callable

from hivetrain import scoring
from hivetrain.chain.base import Chain, Code, LedgerError, Snapshot
from hivetrain.contribution.audit import Audit, Verdict
from hivetrain.data.errors import DataError
from hivetrain.errors import UserError
from hivetrain.validator.auditor import Auditor
from hivetrain.validator.config import ScoringOptions
from hivetrain.validator.intake import Admission
from hivetrain.validator.judging import Judge
from hivetrain.validator.polling import Poller
from hivetrain.validator.run import FollowedRun, SwarmFault
from hivetrain.validator.state import OpenRecord, State
from hivetrain.validator.submission import Submission
from hivetrain.validator.sums import Sums
from hivetrain.validator.tempos import Tempos, ends_between, last_end, margin_of
from hivetrain.validator.watch import ValidatorWatcher

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 30.0


class Validator:
    """Judges one run's miners on one chain.

    Args:
        chain: whose hotkey sets the weights.
        run: the run, followed.
        state: open.
        admission: the border for records.
        auditor: replays.
        options: of the scoring.
        timeout_s: limit for one call to the chain.
        clock: monotonic seconds; bounds how long a round audits.
        watcher: follows what it does.
    """

    def __init__(
        self,
        chain: Chain,
        run: FollowedRun,
        state: State,
        admission: Admission,
        auditor: Auditor,
        options: ScoringOptions,
        timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        watcher: ValidatorWatcher | None = None,
    ) -> None:
        self._watcher = watcher or ValidatorWatcher()
        self._chain, self._run, self._state, self._options = chain, run, state, options
        self._timeout_s, self._clock = timeout_s, clock
        self._tempos = Tempos(state.database)
        self._poller = Poller(chain, run, state, admission, auditor, timeout_s)
        self._judge = Judge(chain, run, state, admission.rules, auditor, timeout_s, clock, self._watcher)
        self._sums = Sums(state, auditor, self._watcher)
        self._submission = Submission(
            chain, state, self._tempos, options.version_key, options.most_attempts, timeout_s, self._watcher
        )  # fmt: skip
        self._poll_s = options.poll_s or 1.0
        self.faults = 0

    def run_forever(self, stop: Callable[[float], bool]) -> None:
        """Makes rounds until told to stop; a fault of chain, swarm or data ends a round, not the validator.

        Args:
            stop: waits so many seconds and returns whether to stop, as an Event's ``wait`` does.

        Raises:
            UserError: the configuration cannot work on this chain.
            LedgerError: the chain was closed.
        """
        failed = 0
        while True:
            busy = False
            try:
                busy = self.run_once()
                failed = 0
            except (LedgerError, SwarmFault, DataError) as error:
                if isinstance(error, LedgerError) and error.code is Code.CLOSED:
                    raise
                failed, self.faults = failed + 1, self.faults + 1
                self._watcher.failed(_source(error))
                logger.warning("round cut short (%d in a row): %s", failed, error)
            except UserError:
                raise
            except Exception:  # nothing that a miner publishes may end the pay of all others
                failed, self.faults = failed + 1, self.faults + 1
                logger.exception("round failed (%d in a row)", failed)
            if stop(0 if busy else min(_LONGEST_PAUSE_S, self._poll_s * 2 ** min(failed, 3))):
                return

    def run_once(self) -> bool:
        """One round; returns whether audits are waiting for the next one.

        Raises:
            LedgerError: the chain failed.
            SwarmFault: the swarm failed; what does not need it has been done.
        """
        began = self._clock()
        view = self._chain.snapshot(self._timeout_s)
        margin = margin_of(view, self._options.submit_margin)
        self._poll_s = self._options.poll_s or min(6.0, max(0.1, view.rules.block_time_s / 2 or 1.0))
        ends = self._ends(view, margin)
        fault = None
        try:
            self._poller.poll(view)
        except SwarmFault as error:
            fault = error
        self._judge.match()
        self._judge.draw(view.block)
        busy = self._judge.judge(self._poll_s, ends[-1] if ends else None)
        self._sums.check()
        self._watcher.polled(view.block, self._run.epoch, self._state.count_open(), self._clock() - began)
        self._score(view, margin, ends, fault is None)
        self._submission.step(view)
        if fault is not None:
            raise fault
        return busy

    def _ends(self, view: Snapshot, margin: int) -> list[int]:
        """Ends of the tempos that are over and not scored."""
        after = self._tempos.last_end()
        if after is None:
            after = last_end(view, margin)
            with self._state.transaction():
                self._state.set_fact("began", str(after))
        return ends_between(after, view, margin)

    def _score(self, view: Snapshot, margin: int, ends: list[int], swarm_was_read: bool) -> None:
        after = self._tempos.last_end()
        assert after is not None
        for end in ends:
            if not self._state.polled_between(after, end):
                logger.warning("tempo %d: this validator was away for all of it; it is not scored", end)
                continue
            waiting = self._state.open_records("due <= ?", end)
            # A swarm that cannot be read holds up only what can be judged without it, once the chain's epoch is here.
            patient = swarm_was_read or view.block < end + margin
            if any(record.exchanged and (patient or record.reveal or record.drawn == ()) for record in waiting):
                return
            self._close(view, end, waiting)
            after = end

    def _close(self, view: Snapshot, end: int, still_open: list[OpenRecord]) -> None:
        """Scores a tempo, all of it or nothing."""
        with self._state.transaction():
            for record in still_open:
                if record.due <= end - view.tempo:
                    self._judge.decide(record, Audit(Verdict.UNJUDGED, "Its swarm epoch did not end within a tempo."))
            scores = scoring.tempo_scores(self._tempos.judged_until(end))
            registered = [neuron.hotkey for neuron in view.neurons]
            averages = scoring.update_averages(self._tempos.averages(), scores, registered, self._options.alpha)
            weights = scoring.weights(averages)
            self._tempos.add(end, view.block, scores, averages, weights)
            oldest = end - self._options.keep_tempos * view.tempo
            self._state.prune(oldest)
            self._tempos.prune(oldest)
        self._watcher.scored(end, scores, averages, weights, self._state.last_objections(end))
        forfeited = [hotkey for hotkey, score in scores.items() if score.forfeited]
        logger.info(
            "tempo %d: %d verified samples of %d hotkeys, %d weights%s",
            end, sum(score.samples for score in scores.values()), len(scores), len(weights),
            f"; forfeited: {', '.join(forfeited)}" if forfeited else "",
        )  # fmt: skip


def _source(error: Exception) -> str:
    return "chain" if isinstance(error, LedgerError) else "data" if isinstance(error, DataError) else "dht"
