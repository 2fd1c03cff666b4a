"""How the members' values become one: a plain weighted mean, or one in which no member is louder than most."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch


class Rule(ABC):
    """Reduces one part.

    Attributes:
        needs_all: whether nothing can be computed before all members' values are there.
    """

    needs_all: bool

    @abstractmethod
    def reduce(self, values: Mapping[int, torch.Tensor], shares: Sequence[float], out: torch.Tensor) -> None:
        """Writes the result of all members' ``values``, each of shape (n,), to ``out``.

        Args:
            values: by member.
            shares: averaging weight of each member; they sum to 1.
            out: shape (n,).
        """


class Mean(Rule):
    """The weighted mean; parts are added as they come."""

    needs_all = False

    def reduce(self, values: Mapping[int, torch.Tensor], shares: Sequence[float], out: torch.Tensor) -> None:
        weighted_sum(values, {member: shares[member] for member in values}, out)


class Clipped(Rule):
    """The weighted mean of values scaled down to at most the median of the members' norms.

    The median is the lower one of an even number, so that half of the members cannot set it by being loud. What a
    sign flipper sends still counts, but for no more than an honest gradient does.
    """

    needs_all = True

    def reduce(self, values: Mapping[int, torch.Tensor], shares: Sequence[float], out: torch.Tensor) -> None:
        norms = {member: float(torch.linalg.vector_norm(v, dtype=torch.float64)) for member, v in values.items()}
        limit = sorted(norms.values())[(len(norms) - 1) // 2]
        factors = {member: shares[member] * (limit / norm if norm > limit else 1.0) for member, norm in norms.items()}
        weighted_sum(values, factors, out)


def weighted_sum(values: Mapping[int, torch.Tensor], factors: Mapping[int, float], out: torch.Tensor) -> None:
    """Writes the sum of values times factors to ``out``, member by member."""
    first, *rest = sorted(values)
    torch.mul(values[first], factors[first], out=out)
    for member in rest:
        out.add_(values[member], alpha=factors[member])


RULES: dict[str, Rule] = {"mean": Mean(), "clipped": Clipped()}
