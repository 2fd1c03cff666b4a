"""The arithmetic of pay: by hand, and as properties that must hold for any input."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hivetrain.contribution.audit import Verdict
from hivetrain.scoring import FORFEITING, PAID, Judged, tempo_scores, update_averages, weights

HOTKEYS = ("a", "b", "c", "d")
UNPAID = frozenset(Verdict) - PAID - FORFEITING
RANK = {verdict: 0 if verdict in FORFEITING else 1 if verdict in UNPAID else 2 for verdict in Verdict}
RANK[Verdict.PASSED] = 3

judged = st.builds(
    Judged, st.sampled_from(HOTKEYS), st.integers(0, 50), st.integers(1, 10**6), st.sampled_from(list(Verdict))
)
tempos = st.lists(st.lists(judged, max_size=12), min_size=1, max_size=4)
alphas = st.floats(0.01, 1)


def run(tempos, alpha=0.5, registered=HOTKEYS):
    averages = {}
    for entries in tempos:
        averages = update_averages(averages, tempo_scores(entries), registered, alpha)
    return averages


def paid(hotkey, samples, verdict=Verdict.PASSED):
    return Judged(hotkey, 0, samples, verdict)


def test_two_tempos_by_hand():
    first = [paid("a", 30), paid("a", 10, Verdict.NOT_DRAWN), paid("b", 20), paid("c", 10)]
    second = [paid("a", 8), paid("b", 100), paid("b", 1, Verdict.FAILED), paid("c", 5, Verdict.LATE)]
    averages = run([first, second])
    assert averages == {"a": 0.5 * 20 + 4, "c": 0.5 * 5}  # b: forfeited and reset; c: nothing new
    assert weights(averages) == {"a": 14 / 16.5, "c": 2.5 / 16.5}


def test_nobody_begins_to_earn_without_a_passed_audit():
    undrawn = [paid("a", 10, Verdict.NOT_DRAWN)]
    assert run([undrawn, undrawn]) == {}
    assert run([undrawn, [*undrawn, paid("a", 2)]]) == {"a": 6}
    assert run([[paid("a", 10)], undrawn]) == {"a": 7.5}  # who has a standing keeps it
    failed = [paid("a", 1, Verdict.FAILED)]
    assert run([[paid("a", 10)], failed, undrawn]) == {}  # and has to earn it again
    assert run([[paid("a", 10)], failed, undrawn, [paid("a", 4)]]) == {"a": 2}


def test_what_is_paid_and_what_forfeits():
    scores = tempo_scores([paid(verdict.value, 7, verdict) for verdict in Verdict])
    assert {name for name, score in scores.items() if score.samples} == PAID
    assert {name for name, score in scores.items() if score.forfeited} == {Verdict.FAILED, Verdict.MISSING}
    assert scores["late"].counts == {Verdict.LATE: 1}


def test_a_hotkey_that_is_no_longer_registered_is_forgotten_and_begins_anew():
    before = run([[paid("a", 10), paid("b", 10)]])
    without = update_averages(before, {}, ["b"])
    assert without == {"b": 2.5}
    assert update_averages(without, tempo_scores([paid("a", 10)]), ["a", "b"]) == {"a": 5, "b": 1.25}


def test_nobody_is_weighted_when_nobody_earned_anything():
    assert weights({}) == {}
    assert run([[paid("a", 10, Verdict.NOT_EXCHANGED), paid("b", 5, Verdict.MISSING)]]) == {}


@pytest.mark.parametrize("alpha", [0, -1, 1.5, float("nan")])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        update_averages({}, {}, [], alpha)


@given(tempos, alphas, st.data())
def test_no_worse_verdict_ever_raises_a_score(tempos, alpha, data):
    tempo = data.draw(st.integers(0, len(tempos) - 1))
    if not tempos[tempo]:
        return
    place = data.draw(st.integers(0, len(tempos[tempo]) - 1))
    entry = tempos[tempo][place]
    worse = data.draw(st.sampled_from([v for v in Verdict if RANK[v] <= RANK[entry.verdict]]))
    changed = [list(entries) for entries in tempos]
    changed[tempo][place] = Judged(entry.hotkey, entry.swarm_epoch, entry.samples, worse)
    before, after = run(tempos, alpha), run(changed, alpha)
    assert after.get(entry.hotkey, 0) <= before.get(entry.hotkey, 0)
    assert weights(after).get(entry.hotkey, 0) <= weights(before).get(entry.hotkey, 0)
    assert all(after.get(other, 0) == before.get(other, 0) for other in HOTKEYS if other != entry.hotkey)


@given(tempos, alphas, st.data())
def test_no_further_penalty_ever_raises_a_score(tempos, alpha, data):
    tempo = data.draw(st.integers(0, len(tempos) - 1))
    penalty = data.draw(judged.filter(lambda entry: entry.verdict not in PAID))
    added = [[*entries, penalty] if number == tempo else entries for number, entries in enumerate(tempos)]
    assert run(added, alpha).get(penalty.hotkey, 0) <= run(tempos, alpha).get(penalty.hotkey, 0)


@given(tempos, st.randoms(), alphas)
def test_the_order_of_the_inputs_does_not_matter_to_the_last_bit(tempos, shuffler, alpha):
    shuffled = [shuffler.sample(entries, len(entries)) for entries in tempos]
    registered = shuffler.sample(HOTKEYS, len(HOTKEYS))
    expected = weights(run(tempos, alpha))
    found = weights(run(shuffled, alpha, registered))
    assert list(found.items()) == list(expected.items())
    items = list(run(tempos, alpha).items())
    shuffler.shuffle(items)
    assert list(weights(dict(items)).items()) == list(expected.items())


@given(tempos, alphas)
def test_weights_sum_to_one_or_there_are_none(tempos, alpha):
    found = weights(run(tempos, alpha))
    assert not found or math.fsum(found.values()) == pytest.approx(1, rel=1e-12)
    assert all(share > 0 for share in found.values())


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.lists(st.integers(1, 10**9), max_size=3), alphas)
def test_splitting_work_over_hotkeys_earns_exactly_as_much(pieces, others, alpha):
    rest = [paid(f"other{number}", samples) for number, samples in enumerate(others)]
    one = [*rest, *(paid("one", samples) for samples in pieces)]
    many = [*rest, *(paid(f"part{number}", samples) for number, samples in enumerate(pieces))]
    whole = weights(run([one, one], alpha, [entry.hotkey for entry in one]))["one"]
    split = weights(run([many, many], alpha, [entry.hotkey for entry in many]))
    assert math.fsum(share for hotkey, share in split.items() if hotkey.startswith("part")) == pytest.approx(
        whole, rel=1e-9
    )


@given(st.dictionaries(st.sampled_from(HOTKEYS), st.integers(1, 10**9), min_size=2))
def test_pay_is_in_proportion_to_samples(samples):
    shares = weights(run([[paid(hotkey, count) for hotkey, count in samples.items()]]))
    total = sum(samples.values())
    assert shares == pytest.approx({hotkey: count / total for hotkey, count in samples.items()}, rel=1e-12)


@settings(max_examples=3)
@given(st.integers(0, 2**32))
def test_a_thousand_tempos_leave_finite_weights(seed):
    draw = random.Random(seed)
    tempos = [[paid(draw.choice(HOTKEYS), draw.randint(1, 10**6))] for _ in range(30)] + [[]] * 1200
    assert run(tempos) == {}
