"""What a validator's configuration may say; the signatures are the schema."""

from dataclasses import dataclass

from hivetrain.contribution.replay import REPLAY_PRECISIONS
from hivetrain.errors import UserError
from hivetrain.keys import DEFAULT_WALLET_PATH


@dataclass(frozen=True)
class RunOptions:
    """The run to follow; everything as its miners have it.

    Args:
        run_id: name of the run.
        initial_peers: where to join: multiaddrs or bootstrap URLs, as a list or a comma-separated string. None: taken
            from the environment variable ``HIVETRAIN_INITIAL_PEERS``.
        target_batch_size: samples in one global update.
        compression: encoding of exchanged gradients.
        gradient_clip_val: the miners' ``trainer.gradient_clip_val``; None or 0: no clipping.
        device: where global updates are made again, such as ``cpu`` or ``cuda:0``; of the miners' kind.
        keep_epochs: epochs whose params are kept on disk; audits reach back ``beacon_lag + reveal_blocks`` blocks.
        timeout_s: limit for one request to a peer or to the DHT.
        record_ttl: the miners' ``record_ttl``, seconds.
        bootstrap_timeout: seconds to find and join the swarm.
        host_maddrs: where to listen; None: loopback only, a free port.
        client_mode: cannot be dialled and serves nothing of the DHT.
    """

    run_id: str = "hivetrain"
    initial_peers: list[str] | str | None = None
    target_batch_size: int = 1024
    compression: str = "none"
    gradient_clip_val: float | None = None
    device: str = "cpu"
    keep_epochs: int = 16
    timeout_s: float = 30.0
    record_ttl: float = 30.0
    bootstrap_timeout: float = 60.0
    host_maddrs: list[str] | None = None
    client_mode: bool = True

    def __post_init__(self) -> None:
        if not self.run_id or "." in self.run_id:
            raise UserError(f"run.run_id must be a non-empty name without dots, got {self.run_id!r}")
        for name in ("target_batch_size", "keep_epochs", "timeout_s", "record_ttl", "bootstrap_timeout"):
            if getattr(self, name) <= 0:
                raise UserError(f"run.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class ChainOptions:
    """The chain, and who sets weights on it.

    Args:
        address: a ledger file, ``http://HOST:PORT[#SERVER_HOTKEY]``, or ``bittensor:NETWORK/NETUID``.
        wallet: name of the wallet.
        hotkey: name of its hotkey.
        wallet_path: directory of all wallets.
        timeout_s: limit for one call.
    """

    address: str
    wallet: str = "default"
    hotkey: str = "default"
    wallet_path: str = DEFAULT_WALLET_PATH
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise UserError(f"chain.timeout_s must be positive, got {self.timeout_s}")


@dataclass(frozen=True)
class ReplayOptions:
    """How drawn microbatches are computed again.

    Args:
        device: such as ``cpu`` or ``cuda:0``; may be weaker than the miners'.
        precision: ``32-true`` or ``bf16-mixed``; None: each miner's own, or fp32 for fp16.
        rows: sequences to compute at a time, which bounds the memory of a replay: 8 GB are enough for 4 of GPT-2 small
            with 1024 tokens each. None: the whole microbatch, for a model whose loss is not a mean over sequences.
        most_rows: blocks that a miner's microbatch may have, which bounds the time of a replay. The same for all
            validators of a run.
    """

    device: str = "cpu"
    precision: str | None = None
    rows: int | None = 4
    most_rows: int = 64

    def __post_init__(self) -> None:
        if self.precision not in (None, *REPLAY_PRECISIONS):
            raise UserError(f"replay.precision must be one of {', '.join(REPLAY_PRECISIONS)}, got {self.precision!r}")
        if self.most_rows < 1 or (self.rows is not None and self.rows < 1):
            raise UserError("replay.rows and replay.most_rows must be at least 1")


@dataclass(frozen=True)
class MetricsOptions:
    """Where to serve Prometheus metrics.

    Args:
        port: None: nowhere.
        host: the interface; there is no authentication.
    """

    port: int | None = None
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class ScoringOptions:
    """From verdicts to weights. The same for all validators of a run, so that they agree.

    Args:
        alpha: share of the newest tempo in the moving average, above 0 and at most 1.
        submit_margin: blocks before the chain's epoch at which a tempo is scored; None: a 20th of it, at least 2.
        most_targets: a contribution has at most so many times ``run.target_batch_size`` samples.
        version_key: version of the scoring rules, as the subnet asks for it.
        most_attempts: how often the weights of one tempo are sent.
        keep_tempos: tempos whose verdicts and scores are kept.
        poll_s: seconds between two looks at chain and swarm; None: half a block, at most 6.
    """

    alpha: float = 0.5
    submit_margin: int | None = None
    most_targets: int = 8
    version_key: int = 0
    most_attempts: int = 5
    keep_tempos: int = 20
    poll_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(f"scoring.alpha must lie above 0 and not above 1, got {self.alpha}")
        for name in ("most_targets", "most_attempts", "keep_tempos"):
            if getattr(self, name) < 1:
                raise UserError(f"scoring.{name} must be at least 1, got {getattr(self, name)}")
        if self.submit_margin is not None and self.submit_margin < 0:
            raise UserError(f"scoring.submit_margin must not be negative, got {self.submit_margin}")
        if self.poll_s is not None and self.poll_s <= 0:
            raise UserError(f"scoring.poll_s must be positive, got {self.poll_s}")
