"""Yuma consensus with classic bonds: from what validators said to who is paid. Pure numpy, no state.

Surprising fact: an epoch pays by the permits of the epoch before; those computed here count from the next one on.
Source: subtensor, pallets/subtensor/src/epoch/run_epoch.rs, without liquid alpha.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Epoch:
    """What one epoch decides about n neurons.

    Args:
        consensus: (n,) the weight that stake above kappa agrees on.
        incentive: (n,) miners' shares, sum 1 or 0.
        dividends: (n,) validators' shares, sum 1 or 0.
        bonds: (n, n) scaled so that the largest of each column is 1; input of the next epoch.
        shares: (n,) shares of the emission.
        permits: (n,) who may set weights and be paid for it from now on.
    """

    consensus: Vector
    incentive: Vector
    dividends: Vector
    bonds: Matrix
    shares: Vector
    permits: Mask


def epoch(
    *,
    block: int,
    stake: Vector,
    last_update: NDArray[np.int64],
    registered_at: NDArray[np.int64],
    permits: Mask,
    weights: Matrix,
    bonds: Matrix,
    activity_cutoff: int,
    max_validators: int,
    stake_threshold: float = 0.0,
    kappa: float = 32767 / 65535,
    alpha: float = 0.1,
    beta: float = 1.0,
    owner: int | None = None,
) -> Epoch:
    """Run one epoch.

    Args:
        block: current block.
        stake: (n,) stakes of any scale.
        last_update: (n,) block of each neuron's last weights.
        registered_at: (n,) block of each registration; weights not newer than it do not count for that neuron.
        permits: (n,) permits of the previous epoch.
        weights: (n, n) rows of any scale, row i set by neuron i.
        bonds: (n, n) as returned by the previous epoch.
        activity_cutoff: blocks after which a silent validator stops counting.
        max_validators: number of permits.
        stake_threshold: stake below it counts as none.
        kappa: share of active stake that makes a majority.
        alpha: weight of the new bonds in their moving average.
        beta: how far weights above consensus are cut before they earn bonds, 1 is wholly.
        owner: uid whose weight on itself counts.
    """
    backed = _normalise(np.where(stake >= stake_threshold, stake, 0.0))
    active = last_update + activity_cutoff >= block
    power = _normalise(backed * active * permits)

    valid = permits[:, None] & (last_update[:, None] > registered_at[None, :])
    heard = _heard(weights * valid, owner)

    consensus = _majority(power, heard, kappa)
    clipped = np.minimum(heard, consensus[None, :])
    incentive = _normalise(power @ clipped)

    earned = _normalise_columns(power[:, None] * ((1 - beta) * heard + beta * clipped))
    averaged = _normalise_columns((1 - alpha) * _normalise_columns(bonds) + alpha * earned)
    dividends = _normalise(averaged @ incentive)

    shares = _normalise(incentive + dividends)
    if not shares.any():
        shares = power if power.any() else backed
    peak = averaged.max(axis=0, initial=0.0)
    return Epoch(
        consensus=consensus,
        incentive=incentive,
        dividends=dividends,
        bonds=averaged / np.where(peak > 0, peak, 1.0)[None, :],
        shares=shares,
        permits=_top(backed, max_validators),
    )


def _heard(weights: Matrix, owner: int | None) -> Matrix:
    """(n, n) shares, without what anyone but the owner says of itself."""
    own = weights[owner, owner] if owner is not None else 0.0
    np.fill_diagonal(weights, 0.0)
    if owner is not None:
        weights[owner, owner] = own
    return _normalise_rows(weights)


def _majority(power: Vector, weights: Matrix, kappa: float) -> Vector:
    """(n,) the largest weight of each column that validators with at least kappa of the power reach."""
    if not len(power):
        return np.zeros(0)
    order = np.argsort(-weights, axis=0, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=0)
    reached = np.cumsum(power[order], axis=0) >= kappa
    first = np.argmax(reached, axis=0)
    columns = np.arange(weights.shape[1])
    return np.where(reached.any(axis=0), ranked[first, columns], 0.0)


def _top(stake: Vector, count: int) -> Mask:
    """(n,) the ``count`` largest stakes above zero; a tie goes to the lower uid."""
    permits = np.zeros(len(stake), dtype=np.bool_)
    permits[np.argsort(-stake, kind="stable")[:count]] = True
    return permits & (stake > 0)


def _normalise(vector: Vector) -> Vector:
    total = vector.sum()
    return vector / total if total > 0 else np.zeros_like(vector, dtype=np.float64)


def _normalise_rows(matrix: Matrix) -> Matrix:
    total = matrix.sum(axis=1, keepdims=True)
    return matrix / np.where(total > 0, total, 1.0)


def _normalise_columns(matrix: Matrix) -> Matrix:
    total = matrix.sum(axis=0, keepdims=True)
    return matrix / np.where(total > 0, total, 1.0)
