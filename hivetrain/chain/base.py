"""What miners and validators know of a chain: six calls, two more reads, and the values they return.

Surprising fact: weights are keyed by hotkey, never by uid. A uid can change its owner between scoring and submission,
so every implementation resolves hotkeys against a fresh view inside the call: a newcomer on an old uid gets nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

Weights = Mapping[str, float] | Sequence[tuple[str, float]]


class Code(StrEnum):
    """Why a call failed; the same fault gives the same code on every chain."""

    NOT_REGISTERED = "not_registered"
    RATE_LIMITED = "rate_limited"
    NO_PERMIT = "no_permit"
    LOW_STAKE = "low_stake"
    STALE_VERSION = "stale_version"
    INVALID_WEIGHTS = "invalid_weights"
    INVALID_ENDPOINT = "invalid_endpoint"
    CLOSED = "closed"  # registration is switched off, or this object was closed
    FULL = "full"
    FUNDS = "funds"
    UNREACHABLE = "unreachable"  # nothing was changed; try again later
    INCOMPATIBLE = "incompatible"


class LedgerError(Exception):
    """A call that the chain refused or that never reached it.

    Args:
        code: what a program branches on.
        message: what a person reads; says what to do.
        retry_after_blocks: blocks until the same call can succeed, if known.
    """

    def __init__(self, code: Code, message: str, retry_after_blocks: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_blocks = retry_after_blocks

    def __str__(self) -> str:
        wait = "" if self.retry_after_blocks is None else f" (in {self.retry_after_blocks} blocks)"
        return f"{self.code}: {self.message}{wait}"

    def __reduce__(self) -> tuple[type["LedgerError"], tuple[Code, str, int | None]]:
        return LedgerError, (self.code, self.message, self.retry_after_blocks)


class Outcome(StrEnum):
    """What became of a write."""

    APPLIED = "applied"
    COMMITTED = "committed"  # sealed; the chain applies it at a later epoch
    UNKNOWN = "unknown"  # sent, but the answer was lost: read the chain before sending again


@dataclass(frozen=True)
class Receipt:
    """The outcome of a write.

    Args:
        outcome: what became of it.
        block: the block it is part of, if known.
        dropped: hotkeys that were left out because they hold no uid any more.
        detail: one line for a person.
    """

    outcome: Outcome
    block: int | None = None
    dropped: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True)
class Rules:
    """The rules of one subnet; the defaults are the real chain's. Periods are counted in blocks."""

    tempo: int = 360
    max_uids: int = 256
    immunity_period: int = 4096
    min_non_immune: int = 10
    rate_limit: int = 100
    activity_cutoff: int = 5000
    stake_threshold: float = 0.0
    max_validators: int = 64
    min_weights: int = 1
    max_weight_share: float = 1.0
    version_key: int = 0
    commit_reveal: bool = False
    reveal_period: int = 1  # epochs
    kappa: float = 32767 / 65535
    bonds_alpha: float = 0.1
    bonds_beta: float = 1.0
    consensus: str = "yuma"  # or "null": only the highest stake sets weights
    registration_open: bool = True
    registration_cost: float = 0.0
    emission_per_block: float = 1.0
    allow_loopback: bool = False
    owner: str | None = None
    block_time_s: float = 12.0  # 0: blocks come only when the operator advances them

    def __post_init__(self) -> None:
        positive = ("tempo", "max_uids", "min_weights", "reveal_period", "max_validators")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("kappa", "bonds_alpha", "bonds_beta", "max_weight_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1")
        if self.block_time_s < 0 or self.emission_per_block < 0 or self.registration_cost < 0:
            raise ValueError("block_time_s, emission_per_block and registration_cost must not be negative")


@dataclass(frozen=True)
class Neuron:
    """One registered hotkey as of a snapshot.

    Args:
        uid: its slot, which another hotkey may hold later.
        hotkey: its address.
        stake: what backs it.
        active: it set weights, or registered, within the activity cutoff.
        permit: it may set weights.
        last_update: block of its last weights (or of its registration).
        registered_at: block of its registration.
        incentive: share of the miners' pay in the last epoch.
        dividends: share of the validators' pay in the last epoch.
        emission: what it earned in the last epoch.
        ip: where it serves, if it published that.
        port: where it serves, if it published that.
    """

    uid: int
    hotkey: str
    stake: float
    active: bool
    permit: bool
    last_update: int
    registered_at: int
    incentive: float
    dividends: float
    emission: float
    ip: str | None = None
    port: int | None = None

    @property
    def axon(self) -> str | None:
        """``ip:port``, or None if it serves nowhere."""
        if self.ip is None:
            return None
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


@dataclass(frozen=True)
class Snapshot:
    """One consistent view of a subnet.

    Args:
        block: the block everything here is true at.
        block_hash: its hash, 0x and 64 digits; nobody knows it before the block exists.
        next_epoch: block of the next epoch.
        rules: the subnet's rules.
        neurons: all registered hotkeys, by uid.
    """

    block: int
    block_hash: str
    next_epoch: int
    rules: Rules
    neurons: tuple[Neuron, ...] = field(repr=False)

    @property
    def tempo(self) -> int:
        return self.rules.tempo

    def neuron(self, hotkey: str) -> Neuron | None:
        """The neuron of a hotkey, or None if it is not registered."""
        return self._by_hotkey.get(hotkey)

    @cached_property
    def _by_hotkey(self) -> dict[str, Neuron]:
        return {neuron.hotkey: neuron for neuron in self.neurons}


class Chain(ABC):
    """A subnet as seen by one hotkey. Safe to use from several threads.

    Every call returns or raises within ``timeout_s`` seconds (plus one), whatever the other side does. All failures
    are a :class:`LedgerError`; a write whose outcome is not known returns a receipt that says so.
    """

    @property
    @abstractmethod
    def hotkey(self) -> str:
        """The address this object acts for."""

    @abstractmethod
    def snapshot(self, timeout_s: float) -> Snapshot:
        """One consistent view of the subnet."""

    @abstractmethod
    def register(self, timeout_s: float) -> Receipt:
        """Take a uid. Applied at once, and for free, if the hotkey holds one already."""

    @abstractmethod
    def publish(self, ip: str, port: int, timeout_s: float) -> Receipt:
        """Tell the subnet where this hotkey serves."""

    @abstractmethod
    def submit_weights(self, weights: Weights, version_key: int, timeout_s: float) -> Receipt:
        """Set this validator's weights.

        Args:
            weights: relative, not negative, by hotkey. Unregistered hotkeys are left out and come back in the receipt.
            version_key: version of the scoring rules; older than the subnet's is refused.
            timeout_s: deadline.
        """

    @abstractmethod
    def wait_block(self, block: int, timeout_s: float) -> int:
        """Wait until ``block`` exists; returns the current block, which is smaller if the deadline came first."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; calls in other threads end, later calls raise CLOSED. May be called twice."""

    @abstractmethod
    def block_hash(self, block: int, timeout_s: float) -> str | None:
        """Hash of a block, None if it does not exist yet or is no longer known."""

    @abstractmethod
    def weights(self, timeout_s: float) -> dict[str, dict[str, float]]:
        """Revealed weights, validator to miner to share; each row sums to 1."""

    def __enter__(self) -> "Chain":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Deadline:
    """What is left of a ``timeout_s``.

    Args:
        timeout_s: seconds from now.
        clock: monotonic seconds.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end = clock() + timeout_s

    def left_s(self) -> float:
        return max(0.0, self._end - self._clock())

    def check(self, doing: str) -> float:
        """Seconds left; raises UNREACHABLE when there are none."""
        left = self.left_s()
        if left <= 0:
            raise LedgerError(Code.UNREACHABLE, f"the deadline passed while {doing}")
        return left
