"""How one peer takes part in a run, where peers may differ; what they have in common is in settings.py."""

from dataclasses import dataclass

from hivetrain.averaging.direct.options import DirectOptions


@dataclass(frozen=True)
class PeerOptions:
    """How this peer takes part.

    Attributes:
        run_id: name of the run; prefix of all its DHT keys.
        matchmaking_time_s: how long a round waits for peers that have not come yet.
        averaging_timeout_s: longest time from the start of matchmaking to the end of the exchange.
        record_ttl_s: how long the others count a peer that fell silent.
        max_samples_per_peer: cap on any peer's samples; None: a quarter of the target once there are 4 peers.
        bandwidth: relative bandwidth, for the size of the slice that this peer reduces.
        client_mode: this peer cannot be dialled.
        direct: how it takes part in direct links; None: it uses libp2p alone.
        max_upload_mbit_s: limit on what it sends in exchanges; None: no limit.
    """

    run_id: str
    matchmaking_time_s: float
    averaging_timeout_s: float
    record_ttl_s: float
    max_samples_per_peer: int | None
    bandwidth: float
    client_mode: bool
    direct: DirectOptions | None = None
    max_upload_mbit_s: float | None = None
