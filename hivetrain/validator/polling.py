"""One look at the swarm: which epochs have ended, which records and reveals lie in the DHT.

Surprising fact: what was not found matters as much as what was. Only a poll that would have found a record can make it
late, so each one is kept with its blocks and epochs, and one without a visible peer counts for nothing.
"""

import logging
from collections import defaultdict

from hivetrain.averaging.updates import Followed
from hivetrain.chain.base import Chain, Snapshot
from hivetrain.contribution.record import RecordError, hotkey_subkey, open_reveal, reveal_key, work_key
from hivetrain.validator.auditor import Auditor
from hivetrain.validator.intake import AWAY_REVEAL, Admission, Sighting
from hivetrain.validator.run import FollowedRun, Records, SwarmFault
from hivetrain.validator.state import OpenRecord, State

logger = logging.getLogger(__name__)

MOST_EPOCHS = 64  # read in one poll


class Poller:
    """Reads a run into the state.

    Args:
        chain: tells the time.
        run: the run.
        state: open.
        admission: the border for records.
        auditor: sketches averages.
        timeout_s: limit for one call to the chain.
    """

    def __init__(
        self, chain: Chain, run: FollowedRun, state: State, admission: Admission, auditor: Auditor, timeout_s: float
    ) -> None:
        self._chain, self._run, self._state = chain, run, state
        self._admission, self._auditor, self._timeout_s = admission, auditor, timeout_s

    def poll(self, view: Snapshot) -> None:
        """Follows the run, then reads all records and reveals that matter now.

        Raises:
            SwarmFault: the swarm cannot be read, or nobody is there.
        """
        self._follow()
        if not self._run.digest:
            raise SwarmFault("the run's params are not known yet: no peer has given them")
        run_id, (first, last) = self._admission.run_id, self._epochs()
        members = {hotkey_subkey(neuron.hotkey) for neuron in view.neurons}
        records = {epoch: self._run.collect(work_key(run_id, epoch), members) for epoch in range(first, last + 1)}
        drawn = self._state.open_records("drawn != '[]' AND reveal IS NULL AND NOT looked_after")
        due: dict[int, set[bytes]] = defaultdict(set)
        for record in drawn:
            due[record.contribution.swarm_epoch].add(hotkey_subkey(record.contribution.hotkey))
        reveals = {epoch: self._run.collect(reveal_key(run_id, epoch), due[epoch]) for epoch in sorted(due)}
        block = self._chain.wait_block(view.block, self._timeout_s)
        visible = self._run.num_peers > 0
        with self._state.transaction():
            for epoch, found in records.items():
                self._admit(epoch, found, view, block)
            for record in drawn:
                self._look_for_reveal(record, reveals[record.contribution.swarm_epoch], view.block, visible)
            if visible:
                self._warn_of_gap(block)
                self._state.add_poll(view.block, block, first, last, self._run.caught_up)
        if not visible:
            raise SwarmFault("no peer of the run is visible")

    def _follow(self) -> None:
        followed = self._run.advance()
        sketches = [self._sketch(entry) for entry in followed]
        with self._state.transaction():
            if self._run.caught_up and self._state.forget_rounds_from(self._run.epoch):
                logger.warning("the run has gone back to swarm epoch %d", self._run.epoch)
            for entry, sketch in zip(followed, sketches, strict=True):
                self._state.add_round(entry, sketch)

    def _sketch(self, entry: Followed) -> bytes | None:
        if entry.update is None or entry.update.average is None or self._auditor.sum_tolerance is None:
            return None
        return self._auditor.sketch(entry.epoch, entry.params_digest, entry.update.average)

    def _warn_of_gap(self, block: int) -> None:
        """Says that late records could pass for early ones since the last poll, as where replays take too long."""
        last_began, lag = self._state.last_poll(), self._admission.rules.beacon_lag
        if last_began is not None and block - last_began >= lag:
            logger.warning(
                "%d blocks since the last look at the swarm: records that were made after their beacon could not be "
                "told from earlier ones, which takes a look every %d blocks. If replays are what takes so long, give "
                "them a faster replay.device or lower replay.most_rows",
                block - last_began, lag,
            )  # fmt: skip

    def _epochs(self) -> tuple[int, int]:
        """First and last epoch to read: all that may have had records since the last poll, and the next one."""
        last = self._run.epoch + 1
        read_before = self._state.last_epoch_read()
        first = min(last if read_before is None else read_before, last) - 2
        return max(0, first, last - MOST_EPOCHS), last

    def _admit(self, epoch: int, found: Records, view: Snapshot, block: int) -> None:
        for neuron in view.neurons:
            sealed, _ = found.get(hotkey_subkey(neuron.hotkey), (None, 0.0))
            if sealed is None:
                continue
            sighting = Sighting(sealed, neuron.hotkey, neuron.uid, epoch, block)
            if self._state.knows(sighting.commitment) or self._state.is_full(neuron.hotkey, epoch):
                continue
            seen = self._admission.look(sighting, self._state.was_present)
            self._state.add(seen)
            if seen.verdict is not None:
                logger.info("swarm epoch %d, %s: %s: %s", epoch, neuron.hotkey, seen.verdict, seen.reason)

    def _look_for_reveal(self, record: OpenRecord, found: Records, block: int, visible: bool) -> None:
        """Takes a reveal, or notes that there was none; ``block`` is the one in which the poll began."""
        sealed, _ = found.get(hotkey_subkey(record.contribution.hotkey), (None, 0.0))
        over = block > record.due
        if sealed is not None and _reveals(sealed, record.commitment) and not (over and record.looked_in):
            self._state.set_reveal(record.commitment, sealed, AWAY_REVEAL if over else "")
        elif visible and (over or block >= record.due - (record.due - record.beacon) // 2):
            self._state.looked_for_reveal(record.commitment, after=over)


def _reveals(sealed: bytes, commitment: bytes) -> bool:
    try:
        return open_reveal(sealed).commitment == commitment
    except RecordError:
        return False
