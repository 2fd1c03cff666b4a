"""Judges a contribution by its revealed microbatches, with the numbers as evidence.

The surprising fact: an honest replay in the miner's precision differs from its sketch by 0.2 % at most, one with a
single sequence of eight swapped by 14 % and more, at any time of a training. Cosines do not separate the two, and other
precisions blur them: a microbatch whose gradient is a spike may be off by 7 % between fp32 and bf16.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from hivetrain.contribution import merkle
from hivetrain.contribution.record import Contribution, Reveal, RevealedLeaf
from hivetrain.contribution.replay import REPLAYED_IN, Replayed, Replayer, place_of
from hivetrain.contribution.sketch import sketch_seed, sketch_vector
from hivetrain.data.errors import AssignmentError
from hivetrain.data.reader import Place, SlotReader


class Verdict(StrEnum):
    """What became of one contribution."""

    PASSED = "passed"
    FAILED = "failed"
    MISSING = "missing"
    NOT_DRAWN = "not drawn"
    LATE = "late"
    EARLY = "early"
    INVALID = "invalid"
    UNJUDGED = "unjudged"
    NOT_EXCHANGED = "not exchanged"


@dataclass(frozen=True)
class Tolerance:
    """Largest errors of an honest leaf, relative to the replay."""

    sketch: float
    loss: float


# By the precision in which the miner trains. Measured: benchmarks/tolerance.py.
TOLERANCES = dict.fromkeys(REPLAYED_IN, Tolerance(sketch=0.02, loss=0.005))
# Of a total beside the sum of all its leaves, relative to the sum of their lengths: rounding of fp32 is below 1e-6.
TOTAL_TOLERANCE = 1e-4
# Of ``check_sum``, by the swarm's compression; powersgd drops most of a gradient by design and cannot be checked.
SUM_TOLERANCES: dict[str, float] = {"none": 1e-4, "fp16": 0.01, "int8": 0.05}


@dataclass(frozen=True)
class LeafAudit:
    """One revealed leaf beside its replay. Errors are ``inf`` where there is nothing to compare with.

    Attributes:
        index: number of the leaf.
        offset: blocks from the contribution's first one, as revealed.
        place: (data_pass, window, place, block) of its first block.
        loss: as revealed.
        replayed_loss: ours.
        loss_error: error of the loss, relative to ours or to 1 nat, whichever is larger.
        sketch_error: relative error of the sketch.
        sketch_norm: length of our sketch.
        precision: of our replay.
        tolerance: the largest errors that pass.
    """

    index: int
    offset: int
    place: Place
    loss: float
    replayed_loss: float
    loss_error: float
    sketch_error: float
    sketch_norm: float
    precision: str
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether both errors are within the tolerance; not a number never is."""
        return self.sketch_error <= self.tolerance.sketch and self.loss_error <= self.tolerance.loss


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        verdict: the outcome.
        reason: one sentence for people.
        leaves: the replayed leaves; empty where it did not come to a replay.
    """

    verdict: Verdict
    reason: str
    leaves: tuple[LeafAudit, ...] = ()


def audit(
    contribution: Contribution,
    reveal: Reveal | None,
    drawn: Sequence[int],
    seed: bytes,
    slot: int,
    replayer: Replayer,
) -> Audit:
    """Judges one contribution by its revealed leaves.

    Args:
        contribution: as signed and opened; committed before the beacon.
        reveal: as signed and opened; None: none was seen in time.
        drawn: leaves that the beacon drew, in ascending order; empty: it is not audited.
        seed: of the epoch's sketches, from the validator's own params digest.
        slot: the hotkey's.
        replayer: holds the params of the contribution's epoch.

    Raises:
        ValueError: the contribution is of other params than ``seed``: that is no matter for an audit.
        DataError: the data cannot be read now: nothing is said about the miner. Try again, or leave it unjudged.
    """
    if seed != sketch_seed(contribution.run_id, contribution.swarm_epoch, contribution.params_digest):
        raise ValueError("the contribution is of another run, epoch or params than the seed")
    replayer.reader.assignment.units(0, slot)  # raises: a slot that does not exist is not the miner's fault
    if not drawn:
        return Audit(Verdict.NOT_DRAWN, "The beacon did not draw it.")
    if contribution.precision not in TOLERANCES:
        return Audit(Verdict.INVALID, f"Work in precision {contribution.precision!r} cannot be audited.")
    if reveal is None:
        return Audit(Verdict.MISSING, f"{_named(drawn)} drawn, and no reveal in time.")
    objection = _wrong_reveal(contribution, reveal, drawn) or _wrong_data(contribution, slot, replayer.reader)
    if objection:
        return Audit(Verdict.FAILED, objection)
    tolerance, own, leaves = TOLERANCES[contribution.precision], REPLAYED_IN[contribution.precision], []
    for revealed in reveal.leaves:
        replayed = replayer.replay(seed, slot, contribution, revealed.leaf.offset)
        leaf = _compare(revealed, replayed, tolerance)
        if not leaf.passed and replayed.precision != own:
            # Some honest microbatches are far off across fp32 and bf16: only the miner's own precision may accuse.
            leaf = _compare(revealed, replayer.replay(seed, slot, contribution, revealed.leaf.offset, own), tolerance)
        leaves.append(leaf)
    return _judge(tuple(leaves))


def check_sum(average_sketch: torch.Tensor, members: Sequence[tuple[float, Contribution]]) -> float:
    """Relative error between the sketch of the averaged gradient and what the members' total sketches say it is.

    Sketches are linear, so the two are equal up to rounding (``SUM_TOLERANCES``). A larger error means that somebody
    sent other bytes than it committed to; it does not say who.

    Args:
        average_sketch: of the averaged gradient, before clipping, (256,).
        members: averaging weight and contribution of every member of the round.
    """
    expected = torch.zeros(average_sketch.shape, dtype=torch.float64)
    for weight, contribution in members:
        expected += weight / contribution.samples * sketch_vector(contribution.total)
    return relative_error(expected / sum(weight for weight, _ in members), average_sketch)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``|found - expected| / |expected|``; 0 if both are zero, ``inf`` if only one is or a number is not finite."""
    found, expected = found.double(), expected.double()
    distance, norm = float((found - expected).norm()), float(expected.norm())
    if not (math.isfinite(distance) and math.isfinite(norm)):
        return math.inf
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / norm


def _wrong_reveal(contribution: Contribution, reveal: Reveal, drawn: Sequence[int]) -> str | None:
    """What is wrong with a reveal before any leaf is replayed."""
    ours = (contribution.run_id, contribution.hotkey, contribution.swarm_epoch)
    if (reveal.run_id, reveal.hotkey, reveal.swarm_epoch) != ours:
        return "The reveal is of another contribution."
    shown = [revealed.index for revealed in reveal.leaves]
    if shown != list(drawn):
        return f"{_named(drawn)} drawn, {_named(shown).lower()} revealed."
    for revealed in reveal.leaves:
        leaf_hash = revealed.leaf.hash
        if not merkle.verify(contribution.root, contribution.microbatches, revealed.index, leaf_hash, revealed.path):
            return f"Leaf {revealed.index} is not the one it committed to."
    return _wrong_offsets(contribution, reveal) or _wrong_total(contribution, reveal)


def _wrong_offsets(contribution: Contribution, reveal: Reveal) -> str | None:
    """Whether leaves at these offsets would count a block twice."""
    most, least = contribution.span - contribution.samples, 0  # blocks left out so far: never fewer than before
    for revealed in reveal.leaves:
        left_out = revealed.leaf.offset - revealed.index * contribution.batch_size
        if not least <= left_out <= most:
            return f"Leaf {revealed.index} cannot begin {revealed.leaf.offset} blocks after its first one."
        least = left_out
    return None


def _wrong_total(contribution: Contribution, reveal: Reveal) -> str | None:
    """Whether the total is not the sum of the leaves, where all of them are revealed."""
    if len(reveal.leaves) < contribution.microbatches:
        return None
    parts = [contribution.batch_size * revealed.leaf.vector.double() for revealed in reveal.leaves]
    distance = float((torch.stack(parts).sum(0) - sketch_vector(contribution.total).double()).norm())
    # Relative to the lengths, not to the sum: leaves that cancel out leave their rounding, and what underflows nothing.
    length = max(sum(float(part.norm()) for part in parts), 1e-30)
    if distance <= TOTAL_TOLERANCE * length:
        return None
    return f"Its total is not the sum of its leaves, which are all revealed: off by {distance / length:.2g}."


def _wrong_data(contribution: Contribution, slot: int, reader: SlotReader) -> str | None:
    """What is wrong with the blocks that a contribution says it used."""
    first, last = place_of(contribution.first), place_of(contribution.last)
    try:
        if reader.position_at(slot, first, 0) != first:
            return f"Its slot's stream has no block {first}."
        found = reader.position_at(slot, first, contribution.span - contribution.batch_size)
    except AssignmentError as error:
        return f"It names data that do not exist: {error}"
    if found != last:
        return f"Its last microbatch begins at {found} of its slot's stream, not at {last}."
    return None


def _compare(revealed: RevealedLeaf, replayed: Replayed, tolerance: Tolerance) -> LeafAudit:
    leaf = revealed.leaf
    return LeafAudit(
        index=revealed.index,
        offset=leaf.offset,
        place=replayed.place,
        loss=leaf.loss,
        replayed_loss=replayed.loss,
        loss_error=abs(leaf.loss - replayed.loss) / max(abs(replayed.loss), 1.0),
        sketch_error=relative_error(sketch_vector(leaf.sketch), replayed.sketch),
        sketch_norm=float(replayed.sketch.norm()),
        precision=replayed.precision,
        tolerance=tolerance,
    )


def _judge(leaves: tuple[LeafAudit, ...]) -> Audit:
    """The verdict over replayed leaves; one that fails is enough."""
    for leaf in leaves:
        if not (math.isfinite(leaf.replayed_loss) and math.isfinite(leaf.sketch_norm)):
            return Audit(Verdict.UNJUDGED, f"Our own replay of leaf {leaf.index} is not finite.", leaves)
    for leaf in leaves:
        if not leaf.passed:
            reason = (
                f"Leaf {leaf.index} is not the gradient of its data: the sketch is off by {leaf.sketch_error:.2g} (at "
                f"most {leaf.tolerance.sketch:g}), the loss by {leaf.loss_error:.2g} (at most {leaf.tolerance.loss:g})."
            )
            return Audit(Verdict.FAILED, reason, leaves)
    worst = max(leaf.sketch_error for leaf in leaves)
    return Audit(
        Verdict.PASSED, f"{_named([leaf.index for leaf in leaves])} replayed: off by {worst:.2g} at most.", leaves
    )


def _named(leaves: Sequence[int]) -> str:
    return f"Leaves {', '.join(map(str, leaves))}" if len(leaves) > 1 else f"Leaf {leaves[0]}"
