import time

import numpy as np
import pytest

from hivetrain.chain.yuma import epoch

KAPPA = 32767 / 65535


def subnet(n, **changes):
    """A subnet of n neurons in which everybody may set weights, nobody has, and nobody is new."""
    facts = {
        "block": 1000,
        "stake": np.ones(n),
        "last_update": np.full(n, 990),
        "registered_at": np.zeros(n, dtype=np.int64),
        "permits": np.ones(n, dtype=bool),
        "weights": np.zeros((n, n)),
        "bonds": np.zeros((n, n)),
        "activity_cutoff": 5000,
        "max_validators": 64,
    }
    return facts | changes


def test_epoch_matches_the_vector_of_a_real_epoch():
    weights = np.zeros((4, 4))
    weights[1, [0, 3]] = 1, 3
    weights[2, [0, 3]] = 3, 1
    result = epoch(
        **subnet(
            4,
            stake=np.array([1.0, 600.0, 400.0, 0.0]),
            permits=np.array([True, True, True, False]),
            weights=weights,
            owner=0,
        )
    )
    np.testing.assert_allclose(result.consensus, [0.25, 0, 0, 0.75], atol=1e-4)
    np.testing.assert_allclose(result.incentive, [0.3125, 0, 0, 0.6875], atol=1e-4)
    np.testing.assert_allclose(result.dividends, [0, 0.75, 0.25, 0], atol=1e-4)
    np.testing.assert_allclose(result.bonds[1, [0, 3]], [1, 1], atol=1e-4)
    np.testing.assert_allclose(result.bonds[2, [0, 3]], [0.6667, 0.2222], atol=1e-4)
    np.testing.assert_allclose(10 * result.shares, [1.5625, 3.75, 1.25, 3.4375], atol=1e-4)


def reference(f, alpha, beta):
    """The same rules written down loop by loop, one scalar at a time."""
    n = len(f["stake"])
    owner, threshold = f.get("owner"), f.get("stake_threshold", 0.0)

    def share(values):
        total = sum(values)
        return [value / total if total > 0 else 0.0 for value in values]

    backed = share([s if s >= threshold else 0.0 for s in f["stake"]])
    active = [f["last_update"][i] + f["activity_cutoff"] >= f["block"] for i in range(n)]
    power = share([backed[i] if active[i] and f["permits"][i] else 0.0 for i in range(n)])
    rows = []
    for i in range(n):
        row = []
        for j in range(n):
            heard = f["permits"][i] and (i != j or i == owner) and f["last_update"][i] > f["registered_at"][j]
            row.append(f["weights"][i][j] if heard else 0.0)
        rows.append(share(row))
    consensus = []
    for j in range(n):
        best = 0.0
        for candidate in {rows[i][j] for i in range(n)}:
            if sum(power[i] for i in range(n) if rows[i][j] >= candidate) >= f.get("kappa", KAPPA):
                best = max(best, candidate)
        consensus.append(best)
    clipped = [[min(rows[i][j], consensus[j]) for j in range(n)] for i in range(n)]
    incentive = share([sum(power[i] * clipped[i][j] for i in range(n)) for j in range(n)])
    bonds = [[0.0] * n for _ in range(n)]
    for j in range(n):
        earned = share([power[i] * ((1 - beta) * rows[i][j] + beta * clipped[i][j]) for i in range(n)])
        before = share([f["bonds"][i][j] for i in range(n)])
        column = share([(1 - alpha) * before[i] + alpha * earned[i] for i in range(n)])
        for i in range(n):
            bonds[i][j] = column[i]
    dividends = share([sum(bonds[i][j] * incentive[j] for j in range(n)) for i in range(n)])
    shares = share([incentive[i] + dividends[i] for i in range(n)])
    return consensus, incentive, dividends, shares, bonds


@pytest.mark.parametrize("seed", range(20))
def test_epoch_agrees_with_a_loop_by_loop_reference(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 24))
    facts = subnet(
        n,
        stake=np.round(rng.exponential(100, n), 1) * (rng.random(n) > 0.2),
        last_update=rng.integers(100, 1000, n),
        registered_at=rng.integers(0, 400, n),
        permits=rng.random(n) > 0.3,
        weights=rng.integers(0, 65536, (n, n)) * (rng.random((n, n)) > 0.4),
        bonds=rng.random((n, n)) * (rng.random((n, n)) > 0.5),
        activity_cutoff=700,
        stake_threshold=20.0,
        owner=int(rng.integers(n)) if seed % 2 else None,
    )
    alpha, beta = float(rng.random()), float(rng.random())
    result = epoch(**facts, alpha=alpha, beta=beta)
    consensus, incentive, dividends, shares, bonds = reference(facts, alpha, beta)
    np.testing.assert_allclose(result.consensus, consensus, atol=1e-6)
    np.testing.assert_allclose(result.incentive, incentive, atol=1e-6)
    np.testing.assert_allclose(result.dividends, dividends, atol=1e-6)
    if sum(shares) > 0:
        np.testing.assert_allclose(result.shares, shares, atol=1e-6)
    column_peak = np.max(bonds, axis=0)
    np.testing.assert_allclose(result.bonds, np.array(bonds) / np.where(column_peak > 0, column_peak, 1), atol=1e-6)


def test_incentive_and_dividends_sum_to_one():
    rng = np.random.default_rng(1)
    result = epoch(**subnet(40, stake=rng.exponential(10, 40), weights=rng.random((40, 40))))
    assert result.incentive.sum() == pytest.approx(1)
    assert result.dividends.sum() == pytest.approx(1)
    assert result.shares.sum() == pytest.approx(1)


def test_a_minority_below_kappa_cannot_raise_a_miner():
    weights = np.zeros((5, 5))
    weights[:2, 3], weights[:2, 4] = 9, 1
    honest = epoch(**subnet(5, stake=np.array([30.0, 25.0, 45.0, 0, 0]), weights=weights))
    for bribe in (1, 50, 65535):
        weights[2, 3], weights[2, 4] = 1, bribe
        attacked = epoch(**subnet(5, stake=np.array([30.0, 25.0, 45.0, 0, 0]), weights=weights))
        assert attacked.consensus[4] <= honest.consensus[4] + 1e-12
        assert attacked.incentive[4] <= 0.2


def test_without_a_permit_weights_change_nothing():
    weights = np.zeros((4, 4))
    weights[0, 2] = weights[1, 2] = 1
    permits = np.array([True, False, True, True])
    before = epoch(**subnet(4, weights=weights.copy(), permits=permits))
    weights[1] = [0, 0, 0, 65535]
    after = epoch(**subnet(4, weights=weights, permits=permits))
    np.testing.assert_array_equal(before.shares, after.shares)


def test_weights_older_than_a_registration_do_not_reach_the_newcomer():
    weights = np.zeros((3, 3))
    weights[0, [1, 2]] = 1, 1
    facts = subnet(3, stake=np.array([1.0, 0, 0]), weights=weights, last_update=np.array([500, 990, 990]))
    newcomer = epoch(**(facts | {"registered_at": np.array([0, 0, 500])}))
    assert newcomer.incentive.tolist() == [0, 1, 0]
    assert epoch(**facts).incentive.tolist() == [0, 0.5, 0.5]


def test_with_no_weights_emission_follows_active_stake_then_all_stake():
    stake = np.array([3.0, 1.0, 4.0])
    nobody_speaks = subnet(3, stake=stake, permits=np.array([True, True, False]))
    assert epoch(**nobody_speaks).shares.tolist() == [0.75, 0.25, 0]
    nobody_may = subnet(3, stake=stake, permits=np.zeros(3, dtype=bool))
    assert epoch(**nobody_may).shares.tolist() == [0.375, 0.125, 0.5]


def test_permits_go_to_the_largest_stakes_above_the_threshold():
    facts = subnet(4, stake=np.array([5.0, 9.0, 1.0, 7.0]), max_validators=3, stake_threshold=6.0)
    assert epoch(**facts).permits.tolist() == [False, True, False, True]
    assert epoch(**(facts | {"max_validators": 1})).permits.tolist() == [False, True, False, False]


def test_an_empty_subnet_has_an_epoch():
    assert epoch(**subnet(0)).shares.shape == (0,)


def test_an_epoch_of_256_neurons_takes_under_50_ms():
    rng = np.random.default_rng(2)
    facts = subnet(256, stake=rng.exponential(10, 256), weights=rng.random((256, 256)), bonds=rng.random((256, 256)))
    epoch(**facts)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        epoch(**facts)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
