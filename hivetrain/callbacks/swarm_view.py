"""What callbacks can see of a swarm.

Surprising fact: outside a swarm every optimizer step is the one global update there is, so ``swarm_epoch`` counts
optimizer steps there, and each callback of this package works under any strategy.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer


@runtime_checkable
class Swarm(Protocol):
    """The read-only face of a strategy that trains in a swarm."""

    @property
    def swarm_epoch(self) -> int:
        """Number of global updates so far."""
        ...

    @property
    def num_peers(self) -> int:
        """Peers that train now, this one included."""
        ...

    @property
    def peer_id(self) -> str | None:
        """This peer's name in the swarm; None outside ``setup`` and ``teardown``."""
        ...

    @property
    def samples_accumulated(self) -> int:
        """Samples of all peers towards the next update."""
        ...

    @property
    def target_batch_size(self) -> int:
        """Samples that make one update."""
        ...

    @property
    def visible_maddrs(self) -> list[str]:
        """Addresses at which others reach this peer."""
        ...

    @property
    def rounds(self) -> Sequence[Any]:
        """Reports of the averaging rounds, oldest first."""
        ...

    def params_digest(self) -> str:
        """Digest of the params, equal on peers that agree."""
        ...


def swarm_of(trainer: Trainer) -> Swarm | None:
    """The trainer's strategy if it trains in a swarm."""
    strategy: Any = trainer.strategy
    # isinstance() would evaluate every property, and some of them ask the network.
    return strategy if hasattr(type(strategy), "swarm_epoch") else None


def swarm_epoch(trainer: Trainer) -> int:
    """Global updates so far: the swarm's, or this process's optimizer steps outside one."""
    swarm = swarm_of(trainer)
    return trainer.global_step if swarm is None else swarm.swarm_epoch
