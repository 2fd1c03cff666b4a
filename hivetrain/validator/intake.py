"""What a validator lets in: whether a record was in time, is of this run, and can be judged at all.

Surprising fact: a validator that was away may not call a record late. It was away if it has made no poll since the
record's block that would have found it; then it takes what it finds after the beacon too, and says so in a note.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hivetrain.contribution.audit import TOLERANCES, Audit, Verdict
from hivetrain.contribution.beacon import beacon_block
from hivetrain.contribution.record import Contribution, RecordError, commitment, open_contribution
from hivetrain.contribution.rules import AuditRules
from hivetrain.validator.state import OpenRecord, Round, Seen

AWAY = "Seen after its beacon: this validator was away before. "
_MOST_AHEAD = 2  # blocks that a miner may see before this validator does
AWAY_REVEAL = "Revealed leaves seen after they were due: this validator was away before. "

# (swarm_epoch, from_block) -> whether a poll of ours since then would have found a record
Presence = Callable[[int, int], bool]


@dataclass(frozen=True)
class Sighting:
    """A sealed record as it lay in the DHT.

    Attributes:
        sealed: its bytes; signed by the hotkey.
        hotkey: a registered one.
        slot: its uid.
        swarm_epoch: the epoch under whose key it lay.
        block: the chain's block when it had been read.
    """

    sealed: bytes
    hotkey: str
    slot: int
    swarm_epoch: int
    block: int

    @property
    def commitment(self) -> bytes:
        return commitment(self.sealed)


class Admission:
    """The border for records.

    Args:
        run_id: of the run.
        rules: of its audits.
        n_slots: shares of its data.
        most_samples: in one contribution.
        most_rows: blocks in one microbatch, which a replay has to compute at once.
    """

    def __init__(self, run_id: str, rules: AuditRules, n_slots: int, most_samples: int, most_rows: int) -> None:
        self.run_id, self.rules, self.n_slots = run_id, rules, n_slots
        self.most_samples, self.most_rows = most_samples, most_rows

    def look(self, sighting: Sighting, was_present: Presence) -> Seen:
        """The record as it goes into the state, with a verdict if it is out already."""
        bound = sighting.commitment
        try:
            work = open_contribution(sighting.sealed)
        except RecordError as error:
            reason = f"It cannot be read: {error}."
            return Seen(
                bound, sighting.hotkey, sighting.swarm_epoch, sighting.slot, "", 0, sighting.block, sighting.block,
                sighting.block, None, Verdict.INVALID, reason,
            )  # fmt: skip
        beacon = beacon_block(work, self.rules)
        objection = self._objection(work, sighting)
        late, note = False, ""
        if sighting.block >= beacon:
            late = was_present(sighting.swarm_epoch, min(work.block + 1, beacon - 1))
            note = "" if late else AWAY
        verdict = Verdict.INVALID if objection else Verdict.LATE if late else None
        reason = objection or (f"First seen in block {sighting.block}; its beacon is block {beacon}." if late else "")
        if verdict is Verdict.INVALID:  # its block means nothing
            beacon = min(beacon, sighting.block)
        return Seen(
            bound, sighting.hotkey, sighting.swarm_epoch, sighting.slot, work.peer_id, work.samples, beacon,
            beacon + self.rules.reveal_blocks, sighting.block, sighting.sealed, verdict, reason, note,
        )  # fmt: skip

    def _objection(self, work: Contribution, sighting: Sighting) -> str | None:
        if work.run_id != self.run_id or work.swarm_epoch != sighting.swarm_epoch or work.hotkey != sighting.hotkey:
            return "It is of another run, swarm epoch or hotkey than the place where it lay."
        if sighting.slot >= self.n_slots:
            return f"Uid {sighting.slot} has no data: the run has {self.n_slots} slots."
        if work.rules != self.rules.fingerprint:
            return "Its miner has other audit rules than this validator."
        if work.precision not in TOLERANCES:
            return f"Work in precision {work.precision!r} cannot be audited."
        if work.batch_size > self.most_rows:
            return f"Its microbatches have {work.batch_size} blocks, at most {self.most_rows} are replayed."
        if work.samples > self.most_samples:
            return f"It claims {work.samples} samples, one contribution has at most {self.most_samples}."
        if not is_plausible(work.block, sighting.block):
            return f"It names block {work.block}, which does not exist."
        return None


def is_plausible(block: int, seen: int) -> bool:
    """Whether a record seen in one block can have been made in another."""
    return block <= seen + _MOST_AHEAD


def last_commit(commits: Iterable[tuple[int, int]]) -> int | None:
    """Block of a round's last commitment; None if no record of its members is known.

    Args:
        commits: of each member, the block that its record names and the one in which it was seen.
    """
    return max((block for block, seen in commits if is_plausible(block, seen)), default=None)


def match(record: OpenRecord, ended: Round, last: int | None, rules: AuditRules) -> Audit | None:
    """Why the round that ended the record's epoch does not pay it; None if the record is among its members.

    Args:
        record: seen before its beacon.
        ended: the round.
        last: block of the round's last commitment.
        rules: of the run's audits.
    """
    if ended.members is None:
        return Audit(Verdict.UNJUDGED, f"This validator could not follow swarm epoch {ended.epoch}.")
    work = record.contribution
    if (work.peer_id, work.samples, record.commitment) not in {(peer, n, c) for peer, n, _, c in ended.members}:
        return Audit(Verdict.NOT_EXCHANGED, "No committed round has it among its members.")
    if work.params_digest != ended.digest:
        return Audit(Verdict.INVALID, f"It is of other params, {work.params_digest[:16]}, than the round's.")
    # Who commits long before the others may see its beacon, and choose, while they still work. It is told from who was
    # overtaken by a false block number by having been seen early.
    if last is not None and work.block < last - rules.spread and record.seen < last - _MOST_AHEAD:
        return Audit(Verdict.EARLY, f"It commits in block {work.block}, another member of its round in block {last}.")
    return None


def without_reveal(record: OpenRecord) -> Audit | None:
    """The verdict on a drawn contribution of which no reveal was seen in time; None while it is not over."""
    if not record.looked_after:
        return None
    drawn = ", ".join(map(str, record.drawn or ()))
    if record.looked_in:
        return Audit(Verdict.MISSING, f"Leaves {drawn} drawn by block {record.beacon}, and no reveal by {record.due}.")
    return Audit(Verdict.UNJUDGED, f"This validator was away while leaves {drawn} could be revealed.")
