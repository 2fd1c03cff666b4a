"""Since when a member owes something: by the clock of who waits, and not before it can be sent."""

import pytest

from hivetrain.averaging.debts import Debts

ME, A, B = range(3)
PARTS, WINDOW = 6, 2


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def debts(clock):
    return Debts(ME, [PARTS] * 3, WINDOW, clock)


def of(debts, member, kind):
    return [(debt.index, debt.since) for debt in debts.of(member) if debt.kind == kind]


def complete(debts, index):
    debts.received[A] = debts.received[B] = index + 1
    debts.complete(index)


def test_a_part_is_owed_since_the_one_before_was_completed(debts, clock):
    assert of(debts, A, "part") == of(debts, B, "part") == [(0, 0.0)]
    clock.now, debts.received[A] = 1.0, 1
    assert of(debts, A, "part") == []
    assert of(debts, B, "part") == [(0, 0.0)]
    clock.now = 3.0
    complete(debts, 0)
    assert of(debts, A, "part") == of(debts, B, "part") == [(1, 3.0)]


def test_a_part_is_not_owed_before_the_average_that_opens_its_window_has_been_taken(debts, clock):
    for index in range(WINDOW):
        complete(debts, index)
    clock.now = 5.0
    assert of(debts, A, "part") == []
    assert of(debts, A, "taking") == [(WINDOW, 0.0), (0, 0.0)]  # the averages here, and the own parts there
    debts.take(A, 0)
    clock.now = 9.0
    debts.take(A, 1)  # opens the window further, but not for the part that is due
    assert of(debts, A, "part") == [(WINDOW, 5.0)]
    assert of(debts, B, "part") == []


def test_an_average_is_not_owed_before_the_own_part_has_left(debts, clock):
    clock.now = 2.0
    assert of(debts, A, "average") == []
    debts.send(A, 0)
    clock.now = 3.0
    debts.send(A, 1)
    assert of(debts, A, "average") == [(0, 2.0)]
    clock.now = 4.0
    debts.store(A, 0)
    assert of(debts, A, "average") == [(1, 4.0)]


def test_an_average_that_is_taken_twice_counts_once(debts):
    complete(debts, 0)
    debts.take(A, 0)
    debts.take(A, 0)
    assert debts.taken == [0, 1, 0]


def test_who_alone_is_waited_for_most_of_the_time_brakes(debts, clock):
    for index in range(4):
        clock.now += 0.25
        debts.await_alone(index, A)
        clock.now += 0.75
        complete(debts, index)
        debts.take(A, index)
    assert debts.brakes(2.9) == [A]
    assert debts.brakes(3.1) == []
    clock.now += 10.0  # for nobody in particular
    assert debts.brakes(2.9) == []


@pytest.mark.parametrize("question", ["late", "brakes"])
def test_the_last_part_may_be_completed_while_somebody_looks(clock, question):
    def completes():
        debts._clock = clock
        complete(debts, debts.completed)
        debts._clock = completes if debts.completed < PARTS else clock
        return clock.now

    debts = Debts(ME, [PARTS] * 3, WINDOW, clock)
    for index in range(PARTS):
        debts.await_alone(index, A)
    debts._clock = completes
    for index in range(1, PARTS + 1):
        arguments = () if question == "brakes" else ([A, B],)
        getattr(debts, question)(*arguments, 0.0)
        assert debts.completed >= index


def test_reducers_are_late_when_all_else_is_done_unless_all_of_them_are(debts, clock):
    for index in range(PARTS):
        complete(debts, index)
        debts.send(A, index)
        debts.send(B, index)
    clock.now = 5.0
    assert debts.late_reducers([A, B], 1.0) == []  # the own line may be what is slow
    for index in range(PARTS):
        debts.store(B, index)
    clock.now = 5.9
    debts.store(A, 0)
    assert debts.late_reducers([A, B], 1.0) == []
    clock.now = 6.1
    assert debts.late_reducers([A, B], 1.0) == [A]


def test_a_member_without_a_slice_of_its_own_sees_a_late_reducer(clock):
    debts = Debts(ME, [0, PARTS, PARTS], WINDOW, clock)
    for index in range(PARTS):
        debts.send(A, index)
        debts.send(B, index)
        debts.store(B, index)
    clock.now = 2.0
    assert debts.late_reducers([A, B], 1.0) == [A]
