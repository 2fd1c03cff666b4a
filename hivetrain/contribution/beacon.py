"""Who is audited, and which leaves: a pure function of a block hash that nobody knew when the work was committed.

Surprising fact: no float takes part. The probability is compared as a 64-bit number, so that two validators on
different machines never disagree about a draw.
"""

import hashlib
from itertools import count

import msgpack

from hivetrain.contribution.record import Contribution
from hivetrain.contribution.rules import AuditRules

_DOMAIN = b"hivetrain/contribution/1/beacon"


def beacon_block(record: Contribution, rules: AuditRules) -> int:
    """The block whose hash decides about this contribution."""
    return record.block + rules.beacon_lag


def draw(
    block_hash: str, run_id: str, swarm_epoch: int, hotkey: str, microbatches: int, rules: AuditRules
) -> tuple[int, ...]:
    """Numbers of the leaves that are audited, distinct and rising; () for no audit.

    Args:
        block_hash: 32 bytes in hex, with or without 0x, in either case.
        run_id: the run.
        swarm_epoch: of the contribution.
        hotkey: address of the miner.
        microbatches: number of leaves; all of them are drawn if there are no more than ``rules.leaves``.
        rules: of the run.

    Raises:
        ValueError: the block hash is not one, or there are no leaves.
    """
    beacon = bytes.fromhex(block_hash.removeprefix("0x"))
    if len(beacon) != 32 or microbatches < 1:
        raise ValueError(f"no draw from block hash {block_hash!r} among {microbatches} leaves")
    seed = hashlib.sha256(_DOMAIN + msgpack.packb([beacon, run_id, swarm_epoch, hotkey])).digest()
    if _number(seed, 0) >= rules.threshold:
        return ()
    if microbatches <= rules.leaves:
        return tuple(range(microbatches))
    limit = 2**64 - 2**64 % microbatches  # numbers from here on would favour the first leaves
    drawn: set[int] = set()
    for attempt in count(1):
        if len(drawn) == rules.leaves:
            break
        if (number := _number(seed, attempt)) < limit:
            drawn.add(number % microbatches)
    return tuple(sorted(drawn))


def _number(seed: bytes, index: int) -> int:
    """64 uniform bits."""
    return int.from_bytes(hashlib.sha256(seed + index.to_bytes(8, "big")).digest()[:8], "big")
