"""Merkle trees against RFC 6962's definition."""

import hashlib

import pytest

from hivetrain.contribution import merkle

COUNTS = [1, 2, 3, 4, 5, 6, 7, 8, 13, 64, 100]


def hashes(count: int) -> list[bytes]:
    return [merkle.leaf_hash(str(index).encode()) for index in range(count)]


def defined_root(leaf_hashes: list[bytes]) -> bytes:
    """RFC 6962, section 2.1: split at the largest power of two below the count."""
    if len(leaf_hashes) == 1:
        return leaf_hashes[0]
    split = 1
    while 2 * split < len(leaf_hashes):
        split *= 2
    halves = defined_root(leaf_hashes[:split]) + defined_root(leaf_hashes[split:])
    return hashlib.sha256(b"\x01" + halves).digest()


def test_leaves_hash_as_in_rfc_6962():
    assert merkle.leaf_hash(b"") == hashlib.sha256(b"\x00").digest()
    assert merkle.leaf_hash(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"


@pytest.mark.parametrize("count", COUNTS)
def test_roots_are_those_of_the_definition(count):
    assert merkle.root(hashes(count)) == defined_root(hashes(count))


@pytest.mark.parametrize("count", COUNTS)
def test_every_leaf_is_shown_by_its_path_and_by_no_other(count):
    leaves = hashes(count)
    root = merkle.root(leaves)
    for index, leaf in enumerate(leaves):
        path = merkle.path(leaves, index)
        assert len(path) <= (count - 1).bit_length()
        assert [i for i in range(count) if merkle.verify(root, count, i, leaf, path)] == [index]
        assert [i for i in range(count) if merkle.verify(root, count, index, leaves[i], path)] == [index]


def test_altered_paths_show_nothing():
    leaves = hashes(13)
    root = merkle.root(leaves)
    for index in range(13):
        path = merkle.path(leaves, index)
        for at in range(len(path)):
            for wrong in (
                path[:at] + path[at + 1 :],
                (*path[:at], path[at][::-1], *path[at + 1 :]),
                (*path[:at], path[at][:31], *path[at + 1 :]),
            ):
                assert not merkle.verify(root, 13, index, leaves[index], wrong)
        assert not merkle.verify(root, 13, index, leaves[index], (*path, bytes(32)))
        assert not merkle.verify(root[:31], 13, index, leaves[index], path)


def test_an_inner_node_is_no_leaf():
    leaves = hashes(4)
    left = hashlib.sha256(b"\x01" + leaves[0] + leaves[1]).digest()
    right = hashlib.sha256(b"\x01" + leaves[2] + leaves[3]).digest()
    assert merkle.verify(merkle.root(leaves), 2, 0, left, (right,))  # the proof checks hashes, so ...
    assert merkle.leaf_hash(leaves[0] + leaves[1]) != left  # ... no bytes of a leaf may hash to a node
    assert not merkle.verify(merkle.root(leaves), 4, 0, left, (right,))


def test_leaves_that_are_not_there_are_refused():
    leaves = hashes(3)
    with pytest.raises(ValueError, match="at least one"):
        merkle.root([])
    for index in (-1, 3):
        with pytest.raises(ValueError, match="none of 3"):
            merkle.path(leaves, index)
        assert not merkle.verify(merkle.root(leaves), 3, index, leaves[0], ())
    assert not merkle.verify(merkle.root(leaves), 0, 0, leaves[0], ())
