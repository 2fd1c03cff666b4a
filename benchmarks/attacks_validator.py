"""What a validator makes of the submissions, with the package's own audits and scores; only the network is missing.

The surprising fact: the expensive part does not depend on luck. A submission is the same whoever is drawn later, so
each leaf is replayed once and many chains' draws share it.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attacks_miners import Submission
from attacks_swarm import Swarm

from hivetrain.contribution.audit import Verdict, audit
from hivetrain.contribution.beacon import beacon_block, draw
from hivetrain.contribution.record import (
    Contribution,
    Position,
    commitment,
    open_contribution,
    open_reveal,
)
from hivetrain.contribution.replay import Replayed, Replayer
from hivetrain.data.errors import DataError
from hivetrain.scoring import Judged, tempo_scores, update_averages, weights
from hivetrain.sqlite_file import IN_MEMORY
from hivetrain.validator.config import ReplayOptions, ScoringOptions
from hivetrain.validator.intake import Admission, Sighting, match
from hivetrain.validator.sales import Sales
from hivetrain.validator.schema import Database
from hivetrain.validator.state import OpenRecord, Round


@dataclass(frozen=True)
class Admitted:
    """A submission as far as it can be judged before the beacon.

    Attributes:
        submission: what came.
        record: opened; None if it is none.
        verdict: why it is out already; None if it waits for the beacon.
        samples: that it is paid for if nothing speaks against it: no more than moved the average.
    """

    submission: Submission
    record: Contribution | None
    verdict: Verdict | None
    samples: int = 0


class OneReplayEach(Replayer):
    """Remembers the replays of a round: attackers of one slot have the same microbatches to compute."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.known: dict[tuple[int, Position, int, int, str | None], Replayed] = {}

    def replay(
        self, seed: bytes, slot: int, contribution: Contribution, offset: int, precision: str | None = None
    ) -> Replayed:
        key = slot, contribution.first, offset, contribution.batch_size, precision
        if key not in self.known:
            self.known[key] = super().replay(seed, slot, contribution, offset, precision)
        return self.known[key]


class Validator:
    """Judges every round of a swarm for many chains at once: they differ in the hashes of their blocks."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._replayer = OneReplayEach(swarm.model, swarm.params, swarm.reader)
        economy = swarm.economy
        most_samples = ScoringOptions().most_targets * economy.target_batch_size
        slots, most_rows = swarm.data.assignment.n_slots, ReplayOptions().most_rows
        self._admission = Admission(economy.run_id, economy.rules, slots, most_samples, most_rows)
        self._database = Database(IN_MEMORY)
        self._database.open()
        self._sales = Sales(self._database)
        self._audited: dict[tuple[str, tuple[int, ...]], Verdict] = {}
        self.audits = 0

    def begin_round(self) -> None:
        """Follows the swarm to its current params."""
        self._replayer.load(dict(self._swarm.model.named_parameters()))
        self._replayer.known.clear()
        self._audited.clear()

    def admit(self, submission: Submission) -> Admitted | None:
        """Everything that needs no beacon; None if nothing was published."""
        if not submission.sealed:
            return None
        swarm, miner = self._swarm, submission.miner
        sighting = Sighting(submission.sealed, miner.address, miner.slot, swarm.epoch, submission.seen_block)
        seen = self._admission.look(sighting, lambda epoch, block: True)
        record = None if seen.verdict is Verdict.INVALID else open_contribution(submission.sealed)
        if record is None or seen.verdict is not None:
            return Admitted(submission, record, seen.verdict)
        weight = float(min(submission.offered, swarm.economy.max_samples))
        member = miner.peer_id, submission.offered, weight, commitment(submission.sealed)
        waiting = OpenRecord(
            seen.commitment,
            submission.sealed,
            miner.slot,
            seen.beacon,
            seen.due,
            seen.seen,
            False,
            None,
            None,
            False,
            False,
        )
        ended = Round(swarm.epoch, swarm.digest, (member,))
        with self._database.transaction():
            objection = match(waiting, ended, submission.block, swarm.economy.rules)
            objection = objection or self._sales.objection(record)
            if objection is None:
                self._sales.add(record)
        samples = min(record.samples, int(ended.weight_of(miner.peer_id)))
        return Admitted(submission, record, None if objection is None else objection.verdict, samples)

    def judge(self, admitted: Admitted, chain: str) -> Judged:
        """The verdict on one chain."""
        swarm, record = self._swarm, admitted.record
        hotkey = admitted.submission.miner.address
        if record is None or admitted.verdict is not None:
            return Judged(hotkey, swarm.epoch, 0, admitted.verdict or Verdict.INVALID)
        rules = swarm.economy.rules
        beacon = block_hash(chain, beacon_block(record, rules))
        drawn = draw(beacon, record.run_id, record.swarm_epoch, hotkey, record.microbatches, rules)
        if (hotkey, drawn) not in self._audited:
            self._audited[hotkey, drawn] = self._audit(admitted.submission, record, drawn)
        return Judged(hotkey, swarm.epoch, admitted.samples, self._audited[hotkey, drawn])

    def _audit(self, submission: Submission, record: Contribution, drawn: tuple[int, ...]) -> Verdict:
        self.audits += bool(drawn)
        swarm, reveal = self._swarm, None
        sealed = submission.reveal(drawn, record.run_id, record.swarm_epoch) if drawn else None
        if sealed is not None:
            reveal = open_reveal(sealed)
            if reveal.commitment != commitment(submission.sealed):
                reveal = None
        try:
            return audit(record, reveal, drawn, swarm.sketch_seed, submission.miner.slot, self._replayer).verdict
        except DataError:
            return Verdict.UNJUDGED


def block_hash(chain: str, block: int) -> str:
    """Hash of a block of a simulated chain."""
    return hashlib.sha256(f"{chain} {block}".encode()).hexdigest()


def averages_by_tempo(
    judged: Iterable[Judged], hotkeys: Sequence[str], tempo_rounds: int, rounds: int
) -> list[dict[str, float]]:
    """The moving averages after each tempo of a run."""
    by_tempo: dict[int, list[Judged]] = {}
    for each in judged:
        by_tempo.setdefault(each.swarm_epoch // tempo_rounds, []).append(each)
    found: list[dict[str, float]] = [{}]
    for tempo in range(-(-rounds // tempo_rounds)):
        found.append(update_averages(found[-1], tempo_scores(by_tempo.get(tempo, [])), hotkeys))
    return found[1:]


def pay(averages: Sequence[Mapping[str, float]], hotkeys: Collection[str]) -> dict[str, float]:
    """Sum over the tempos of the weights that each hotkey gets if these are all there are."""
    total = dict.fromkeys(hotkeys, 0.0)
    for tempo in averages:
        for hotkey, weight in weights({hotkey: tempo[hotkey] for hotkey in hotkeys if hotkey in tempo}).items():
            total[hotkey] += weight
    return total
