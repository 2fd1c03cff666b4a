"""The advice that is given when a swarm waits more than it works."""

from hivetrain.averaging.pace import Pace
from hivetrain.averaging.report import Outcome, RoundReport


def run(gathering_s, matchmaking_s, waited=True, rounds=1):
    now = [0.0]
    pace = Pace(100, clock=lambda: now[0])
    for _ in range(rounds):
        now[0] += gathering_s + matchmaking_s
        pace.end_attempt(RoundReport(0, Outcome.AVERAGED, matchmaking_s=matchmaking_s), waited)


def test_a_short_epoch_is_warned_of_once_with_the_number_to_set(caplog):
    run(gathering_s=2, matchmaking_s=4, rounds=3)
    assert [record.message for record in caplog.records] == [
        "gathering a batch takes 2.0 s and finding a group 4.0 s: raise target_batch_size to 301 or more, or set "
        "overlap=True"
    ]


def test_long_epochs_and_overlapped_ones_are_not_warned_of(caplog):
    run(gathering_s=7, matchmaking_s=4)
    run(gathering_s=2, matchmaking_s=4, waited=False)
    assert not caplog.records


def test_speed_is_a_running_mean_of_samples_per_second():
    now = [0.0]
    pace = Pace(100, clock=lambda: now[0])
    for seconds in (2.0, 1.0):
        now[0] += seconds
        pace.add(10)
    assert pace.samples_per_s == 0.7 * 5 + 0.3 * 10
