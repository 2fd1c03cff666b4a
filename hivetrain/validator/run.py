"""What a validator needs to know of a run; ``following.py`` reads it off a swarm."""

from collections.abc import Collection, Mapping
from typing import Protocol

import torch

from hivetrain.averaging.updates import Followed

Records = Mapping[bytes, tuple[bytes, float]]


class SwarmFault(Exception):
    """The swarm, or its DHT, cannot be read now."""


class FollowedRun(Protocol):
    """A run as somebody sees it who follows it. Methods that reach for the network raise SwarmFault."""

    @property
    def epoch(self) -> int:
        """The swarm epoch that it has been followed to."""
        ...

    @property
    def digest(self) -> str:
        """Digest of that epoch's params; "" while they are not known."""
        ...

    @property
    def num_peers(self) -> int:
        """Live peers of the run when it was last looked at."""
        ...

    @property
    def caught_up(self) -> bool:
        """Whether the run itself was no further then."""
        ...

    def advance(self) -> list[Followed]:
        """Follows the run as far as it has gone; returns the epochs that have ended since, in order."""
        ...

    def params(self, epoch: int) -> tuple[str, Mapping[str, torch.Tensor]] | None:
        """The params of an epoch, their digest and they by name, while they are kept."""
        ...

    def collect(self, key: str, wanted: Collection[bytes]) -> Records:
        """The records under a DHT key and these subkeys that their hotkeys signed: subkey -> (record, expiration)."""
        ...

    def close(self) -> None:
        """Leaves the swarm."""
        ...
