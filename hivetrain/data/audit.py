"""For auditors: rebuild one block from public facts, and say in which way a claim about a block is wrong.

The surprising fact: no miner has to be asked. The unit is read from the corpus, and the permutation is run backwards to
find whose unit it is.
"""

import hashlib
from dataclasses import dataclass
from enum import Enum

import torch

from hivetrain.data.assignment import DataAssignment
from hivetrain.data.corpus import Corpus
from hivetrain.data.encoding import Encoder, data_digest
from hivetrain.data.errors import AssignmentError
from hivetrain.data.packing import cut_blocks
from hivetrain.data.stream import unit_tokens


class Verdict(Enum):
    """What is wrong with a claim, in the order in which it is checked."""

    GENUINE = "genuine"
    WRONG_CORPUS = "another corpus or revision"
    WRONG_VOCABULARY = "another vocabulary"
    NOT_ASSIGNED = "a unit that no slot has in this pass"
    WRONG_SLOT = "a unit of another slot"
    WRONG_WINDOW = "a unit of another window"
    NO_SUCH_BLOCK = "a block that the unit does not have"
    WRONG_TOKENS = "other tokens"


@dataclass(frozen=True)
class BlockClaim:
    """What a miner says about one block that it trained on.

    Args:
        manifest_digest: Of the corpus, revision included.
        vocabulary_sha256: Of the tokenizer.
        data_pass: Pass over the data.
        window: Window in the pass.
        slot: The miner's slot: its uid on a chain.
        unit: The unit.
        k: Number of the block in the unit.
        tokens_sha256: ``tokens_sha256`` of the block.
    """

    manifest_digest: str
    vocabulary_sha256: str
    data_pass: int
    window: int
    slot: int
    unit: int
    k: int
    tokens_sha256: str


def block(
    corpus: Corpus, encoder: Encoder, block_size: int, assignment: DataAssignment, unit: int, k: int
) -> torch.Tensor:
    """Rebuild one block, (T,) int64.

    Raises:
        AssignmentError: The assignment is of other data, or nobody has the unit, or the unit has no block ``k``.
        DataError: The unit cannot be read.
    """
    if assignment.digest != data_digest(corpus.manifest.digest, encoder, block_size):
        raise AssignmentError("the assignment is of another corpus, revision, vocabulary or block size")
    if assignment.owner(unit) is None:
        raise AssignmentError(f"unit {unit} belongs to no slot in data pass {assignment.data_pass}")
    blocks = cut_blocks(unit_tokens(corpus, encoder, unit), block_size)
    if not 0 <= k < len(blocks):
        raise AssignmentError(f"unit {unit} has no block {k}, but {len(blocks)}")
    return torch.from_numpy(blocks[k].astype("int64"))


def tokens_sha256(tokens: torch.Tensor) -> str:
    """Hash of a block: its ids as little-endian 32-bit numbers."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<u4").tobytes()).hexdigest()


def check_claim(
    claim: BlockClaim, corpus: Corpus, encoder: Encoder, block_size: int, assignment: DataAssignment
) -> Verdict:
    """Compare a claim with what the public facts say.

    Args:
        claim: The claim; its numbers need not make sense.
        corpus: The corpus of the run.
        encoder: The tokenizer of the run.
        block_size: The block size of the run.
        assignment: The assignment of the run, of any pass.

    Raises:
        DataError: The unit cannot be read, so nothing can be said about the claim.
    """
    if claim.manifest_digest != corpus.manifest.digest:
        return Verdict.WRONG_CORPUS
    if claim.vocabulary_sha256 != encoder.vocabulary_sha256:
        return Verdict.WRONG_VOCABULARY
    if claim.data_pass < 0 or not 0 <= claim.unit < assignment.n_units:
        return Verdict.NOT_ASSIGNED
    assignment = assignment.at_pass(claim.data_pass)
    owner = assignment.owner(claim.unit)
    if owner is None:
        return Verdict.NOT_ASSIGNED
    window, slot = owner
    if slot != claim.slot:
        return Verdict.WRONG_SLOT
    if window != claim.window:
        return Verdict.WRONG_WINDOW
    try:
        tokens = block(corpus, encoder, block_size, assignment, claim.unit, claim.k)
    except AssignmentError:
        return Verdict.NO_SUCH_BLOCK
    return Verdict.GENUINE if tokens_sha256(tokens) == claim.tokens_sha256 else Verdict.WRONG_TOKENS
