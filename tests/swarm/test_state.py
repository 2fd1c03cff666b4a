"""What a peer accepts as another peer's state: checked against the own model before anything is allocated for it."""

import asyncio
import copy

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.averaging.state import (
    CHUNK_BYTES,
    MAX_HEADER_BYTES,
    StateError,
    load_snapshot,
    params_digest,
    receive,
    take_snapshot,
)


def make_trained(seed=0, steps=3, width=300):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(steps):
        module(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


DONOR = make_trained(seed=1)
SNAPSHOT = take_snapshot(*DONOR, epoch=7, digest=params_digest(DONOR[0]))
EPOCH, DIGEST, LISTING = msgpack.unpackb(SNAPSHOT.header())


def download(header, chunks, steps=0):
    async def stream():
        for chunk in chunks:
            yield chunk

    return asyncio.run(receive(header, stream(), *make_trained(steps=steps)))


def with_entry(name, dtype, shape):
    return msgpack.packb([EPOCH, DIGEST, [*(entry for entry in LISTING if entry[0] != name), [name, dtype, shape]]])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_arrives_whole_and_trains_on_alike(steps):
    module, optimizer = make_trained(seed=2, steps=steps)
    snapshot = download(SNAPSHOT.header(), SNAPSHOT.chunks(), steps)
    load_snapshot(snapshot, module, optimizer)
    assert snapshot.epoch == 7
    assert params_digest(module) == SNAPSHOT.digest
    donor = copy.deepcopy(DONOR[0])
    donor_optimizer = torch.optim.AdamW(donor.parameters(), lr=0.1)
    donor_optimizer.load_state_dict(copy.deepcopy(DONOR[1].state_dict()))
    for one, its_optimizer in ((module, optimizer), (donor, donor_optimizer)):
        torch.manual_seed(9)
        one(torch.randn(8, 4)).square().mean().backward()
        its_optimizer.step()
    assert params_digest(module) == params_digest(donor)
    assert all(torch.equal(*pair) for pair in zip(module.buffers(), donor.buffers(), strict=True))


def test_a_short_state_is_refused():
    with pytest.raises(StateError, match="stopped before the end"):
        download(SNAPSHOT.header(), list(SNAPSHOT.chunks())[:-1])


def test_params_that_are_not_those_of_the_digest_are_refused():
    chunks = list(SNAPSHOT.chunks())
    chunks[0] = bytes(len(chunks[0]))
    with pytest.raises(StateError, match="digest"):
        download(SNAPSHOT.header(), chunks)


def test_oversized_chunks_and_headers_are_refused():
    with pytest.raises(StateError, match="chunk"):
        download(SNAPSHOT.header(), [bytes(CHUNK_BYTES + 1)])
    with pytest.raises(StateError, match="too long"):
        download(bytes(MAX_HEADER_BYTES + 1), [])


HUGE = 2**62


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("param/0.weight", "float32", [HUGE, HUGE]),
        ("param/0.weight", "float32", [4, 300]),
        ("param/0.weight", "float64", [300, 4]),
        ("param/0.weight", "complex64", [300, 4]),
        ("param/0.weight", "float32", [-1, 4]),
        ("param/more", "float32", [1]),
        ("optimizer/0/exp_avg", "float32", [HUGE]),
        ("optimizer/0/exp_avg", "float32", [0, 2**80]),
        ("optimizer/0/exp_avg", "float32", [0, HUGE, HUGE]),
        ("optimizer/0/exp_avg", "float32", [1] * 100_000),
        ("optimizer/99/exp_avg", "float32", [1]),
        ("optimizer/x/exp_avg", "float32", [1]),
        ("../../etc", "float32", [1]),
    ],
)
def test_a_tensor_that_does_not_fit_the_own_model_is_refused(name, dtype, shape):
    try:
        header = with_entry(name, dtype, shape)
    except OverflowError:
        header = with_entry(name, dtype, [str(size) for size in shape])
    with pytest.raises(StateError):
        download(header, SNAPSHOT.chunks())


def test_optimizer_state_that_would_break_the_own_optimizer_is_refused():
    for name, shape in (("optimizer/0/exp_avg", [3]), ("optimizer/0/exp_avg", []), ("optimizer/0/step", [4])):
        with pytest.raises(StateError):
            download(with_entry(name, "float32", shape), SNAPSHOT.chunks(), steps=2)
    without = [entry for entry in LISTING if entry[0] != "optimizer/0/exp_avg"]
    with pytest.raises(StateError):
        download(msgpack.packb([EPOCH, DIGEST, without]), SNAPSHOT.chunks(), steps=2)
    odd = [[name.replace("exp_avg_sq", "surprise"), dtype, shape] for name, dtype, shape in LISTING]
    with pytest.raises(StateError):
        download(msgpack.packb([EPOCH, DIGEST, odd]), SNAPSHOT.chunks(), steps=2)


_leaf = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.binary(max_size=9))
_names = st.sampled_from([name for name, _, _ in LISTING] + ["optimizer/0/", "param/", ""])
_entry = st.tuples(
    _names, st.sampled_from(["float32", "int64", "bool", "object"]), st.lists(st.integers(-3, 2**63), max_size=3)
)
_header = st.tuples(_leaf | st.just(EPOCH), _leaf | st.just(DIGEST), st.lists(_entry | _leaf, max_size=4))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | _leaf.map(msgpack.packb) | _header.map(msgpack.packb))
def test_any_other_header_is_a_state_error(header):
    with pytest.raises(StateError):
        download(header, [])
