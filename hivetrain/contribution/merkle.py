"""Merkle trees over leaves, as in RFC 6962: one root commits to all microbatches, a short path shows one of them.

Surprising fact: leaves and inner nodes are hashed with different first bytes. Without that a node could be shown as a
leaf, and a miner could answer an audit with work it never committed to.
"""

import hashlib
from collections.abc import Sequence

HASH_BYTES = 32


def leaf_hash(data: bytes) -> bytes:
    """Hash of one leaf's bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Root of the tree over these leaf hashes.

    Raises:
        ValueError: there are none.
    """
    if not leaf_hashes:
        raise ValueError("a tree has at least one leaf")
    return _levels(leaf_hashes)[-1][0]


def path(leaf_hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Siblings from leaf ``index`` up to the root, lowest first.

    Raises:
        ValueError: there is no such leaf.
    """
    if not 0 <= index < len(leaf_hashes):
        raise ValueError(f"leaf {index} is none of {len(leaf_hashes)}")
    siblings = []
    for level in _levels(leaf_hashes)[:-1]:
        if index ^ 1 < len(level):  # the last node of an odd level has no sibling and moves up as it is
            siblings.append(level[index ^ 1])
        index //= 2
    return tuple(siblings)


def verify(root: bytes, count: int, index: int, leaf_hash: bytes, path: Sequence[bytes]) -> bool:
    """Whether ``leaf_hash`` is leaf ``index`` of the tree of ``count`` leaves with this root."""
    if not 0 <= index < count or any(len(part) != HASH_BYTES for part in (root, leaf_hash, *path)):
        return False
    node, last, left = leaf_hash, count - 1, list(path)
    while last:
        if index ^ 1 <= last:
            if not left:
                return False
            sibling = left.pop(0)
            node = _parent(sibling, node) if index & 1 else _parent(node, sibling)
        index, last = index // 2, last // 2
    return not left and node == root


def _levels(leaf_hashes: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of the tree, the leaves first, the root last."""
    levels = [list(leaf_hashes)]
    while len(below := levels[-1]) > 1:
        pairs = zip(below[0::2], below[1::2], strict=False)
        above = [_parent(one, other) for one, other in pairs]
        levels.append(above + below[-1:] if len(below) % 2 else above)
    return levels


def _parent(one: bytes, other: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + one + other).digest()
