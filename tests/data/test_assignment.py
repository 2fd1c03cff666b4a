import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.data import DataAssignment, slot_of_peer
from hivetrain.data.assignment import Permutation
from hivetrain.data.errors import AssignmentError


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4097])
def test_the_permutation_is_a_bijection_and_runs_backwards(size):
    permutation = Permutation(size, b"key")
    values = [permutation.forward(place) for place in range(size)]
    assert sorted(values) == list(range(size))
    assert [permutation.backward(value) for value in values] == list(range(size))


@given(size=st.integers(1, 3000), key=st.binary(min_size=1, max_size=64))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_permutation_is_a_bijection_for_any_size_and_key(size, key):
    permutation = Permutation(size, key)
    assert {permutation.forward(place) for place in range(size)} == set(range(size))


@given(size=st.integers(1, 1 << 60), place=st.integers(0, 1 << 60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_huge_permutation_stays_in_its_range_and_runs_backwards(size, place):
    permutation = Permutation(size, b"huge")
    value = permutation.forward(place % size)
    assert 0 <= value < size
    assert permutation.backward(value) == place % size


@given(
    slots=st.integers(1, 40),
    per_window=st.integers(1, 5),
    rest=st.integers(0, 700),
    seed=st.integers(),
    data_pass=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_no_two_slots_or_windows_share_a_unit_and_the_rest_is_less_than_a_window(
    slots, per_window, rest, seed, data_pass
):
    n_units = slots * per_window + rest
    assignment = DataAssignment("digest", n_units, seed, data_pass, slots, per_window)
    given_out = {}
    for window in range(assignment.n_windows):
        for slot in range(slots):
            for unit in assignment.units(window, slot):
                assert unit not in given_out
                given_out[unit] = (window, slot)
    assert n_units - len(given_out) < slots * per_window
    assert all(assignment.owner(unit) == given_out.get(unit) for unit in range(n_units))


def test_each_pass_seed_and_digest_has_another_order():
    first = DataAssignment("digest", 10_000, units_per_window=16)
    others = [
        first.at_pass(1),
        DataAssignment("digest", 10_000, seed=1, units_per_window=16),
        DataAssignment("other", 10_000, units_per_window=16),
    ]
    for other in others:
        assert len(set(first.units(0, 0)) & set(other.units(0, 0))) <= 2


def test_the_order_is_the_one_that_was_published():
    assignment = DataAssignment("digest", 1_000_000, seed=7, units_per_window=4)
    assert assignment.units(3, 9) == (
        240266,
        774244,
        824649,
        568127,
    )


def test_units_are_spread_evenly():
    assignment = DataAssignment("digest", 100_000, units_per_window=100)
    low = sum(unit < 50_000 for window in range(3) for slot in range(100) for unit in assignment.units(window, slot))
    assert abs(low - 15_000) < 4 * 0.5 * 30_000**0.5


def test_sixteen_units_of_a_million_take_less_than_a_millisecond():
    assignment = DataAssignment("digest", 1_000_000, units_per_window=16)
    assignment.units(0, 0)
    times = []
    for window in range(50):
        begin = time.perf_counter()
        assignment.units(window, 200)
        times.append(time.perf_counter() - begin)
    assert sorted(times)[len(times) // 2] < 0.001


def test_impossible_sizes_slots_and_windows_are_refused_with_what_to_do():
    with pytest.raises(AssignmentError, match="set n_slots to at most 90"):
        DataAssignment("digest", 90)
    with pytest.raises(AssignmentError, match="at least 1"):
        DataAssignment("digest", 0, n_slots=1)
    assignment = DataAssignment("digest", 90, n_slots=9)
    with pytest.raises(AssignmentError, match="slot 9 does not exist"):
        assignment.units(0, 9)
    with pytest.raises(AssignmentError, match="window 10 is not in this pass"):
        assignment.units(10, 0)
    with pytest.raises(AssignmentError, match="unit 90 does not exist"):
        assignment.owner(90)


def test_the_slot_of_a_peer_is_a_fixed_hash_that_uses_all_slots():
    slots = [slot_of_peer(f"12D3KooW{i}", 16) for i in range(1000)]
    assert slots == [slot_of_peer(f"12D3KooW{i}", 16) for i in range(1000)]
    assert set(slots) == set(range(16))
