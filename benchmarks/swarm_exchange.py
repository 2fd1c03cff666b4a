"""How fast peers exchange a gradient, beside gloo's all-reduce and a bare TCP stream between the same programs.

Nobody trains here: the programs hold a random vector and average it through :class:`SwarmPeer`, as a peer does at the
end of each global batch. The time is that of exchange and vote, without matchmaking.
"""

import itertools
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from swarm_programs import MB, cpu_seconds, meeting_point, programs, questions, table

CODECS = ("none", "fp16", "int8")
RAW, GLOO = "raw TCP, one stream", "gloo all-reduce"
ROUND_S = 120.0
MEET_S = 60.0
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


def measure(sizes: list[int], groups: list[int], repeats: int) -> str:
    """A table of MB/s: fp32 bytes of the vector by the median time of the slowest member."""
    rows = []
    for num_peers in groups:
        rows += _measure_group(num_peers, sizes, repeats)
    header = ["", "peers", "params", "seconds", "MB/s", "of gloo", "CPU s per peer", "python", "DHT", "p2pd"]
    return table(header, rows)


def _measure_group(num_peers: int, sizes: list[int], repeats: int) -> list[list[str]]:
    rows, gloo_s = [], dict.fromkeys(sizes, 0.0)
    with (
        tempfile.TemporaryDirectory() as folder,
        meeting_point() as addresses,
        programs(work, num_peers, num_peers, str(Path(folder) / "gloo"), addresses) as peers,
    ):
        for kind in (RAW, GLOO, *CODECS):
            for peer in peers:
                peer.ask(kind=kind, sizes=sizes, repeats=repeats)
            answers = [peer.answer(MEET_S + len(sizes) * (repeats + 1) * ROUND_S) for peer in peers]
            for numel, members in zip(sizes, zip(*answers, strict=True), strict=True):
                slowest = map(max, zip(*(member["seconds"] for member in members), strict=True))
                taken_s = statistics.median(slowest)
                if kind == GLOO:
                    gloo_s[numel] = taken_s
                cpu_s = {k: statistics.fmean(m["cpu"][k] for m in members) / repeats for k in members[0]["cpu"]}
                rows.append(_row(kind, num_peers, numel, taken_s, gloo_s[numel], cpu_s))
    return sorted(rows, key=lambda row: float(row[2].rstrip("M")))


def _row(kind: str, num_peers: int, numel: int, taken_s: float, gloo_s: float, cpu_s: dict[str, float]) -> list[str]:
    name = f"hivetrain, {kind}" if kind in CODECS else kind
    print(f"{name}: {num_peers} peers, {numel / 1e6:g}M params, {taken_s:.3f} s", file=sys.stderr)
    return [
        name,
        str(num_peers),
        f"{numel / 1e6:g}M",
        f"{taken_s:.3f}",
        f"{4 * numel / MB / taken_s:,.0f}",
        f"{gloo_s / taken_s:.2f}" if gloo_s else "",
        f"{sum(cpu_s.values()):.2f}",
        *(f"{seconds:.2f}" for seconds in cpu_s.values()),
    ]


def work(connection: Connection, rank: int, num_peers: int, store: str, addresses: list[str]) -> None:
    """One member: answers, for each size, with the seconds of each repetition and its processor seconds in total."""
    import torch
    import torch.distributed as gloo

    torch.set_num_threads(1)
    gloo.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_peers)
    try:
        for asked in questions(connection):
            generator = torch.Generator().manual_seed(rank)
            vectors = [torch.randn(numel, generator=generator) for numel in asked["sizes"]]
            if asked["kind"] == RAW:
                answer = [send_raw(vector, rank, asked["repeats"]) for vector in vectors]
            elif asked["kind"] == GLOO:
                answer = [repeat(lambda v=vector: gloo.all_reduce(v), asked["repeats"]) for vector in vectors]
            else:
                answer = average(asked["kind"], vectors, addresses, num_peers, asked["repeats"])
            connection.send(answer)
    finally:
        gloo.destroy_process_group()


def repeat(once: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Times ``once``; what it returns, if anything, counts instead. The first time is a warm-up."""
    import torch.distributed as gloo

    seconds, spent, before_kb = [], {}, 0
    for number in range(repeats + 1):
        gloo.barrier()
        if number == 1:
            spent, before_kb = cpu_seconds(), _forget_peak_memory()
        start = time.monotonic()
        told_s = once()
        seconds.append(time.monotonic() - start if told_s is None else told_s)
    cpu = {name: now - spent[name] for name, now in cpu_seconds().items()}
    return {"seconds": seconds[1:], "cpu": cpu, "memory_mb": (_memory_kb("VmHWM") - before_kb) * 1024 / MB}


def _memory_kb(name: str) -> int:
    """A figure of this process's memory; 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    return 0


def _forget_peak_memory() -> int:
    """Begins to look for the peak anew; returns the kilobytes now in use."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory_kb("VmRSS")


def send_raw(vector: Any, rank: int, repeats: int) -> dict[str, Any]:
    """One TCP stream on loopback from the first member to the second; the rest look on."""
    import torch.distributed as gloo

    if rank > 1:
        gloo.broadcast_object_list([None], src=0)
        return repeat(lambda: 0.0, repeats)
    data = memoryview(vector.numpy()).cast("B")
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            gloo.broadcast_object_list([server.getsockname()], src=0)
            stream, _ = server.accept()
        with closing(stream):
            return repeat(lambda: _send_and_wait(stream, data), repeats)
    told: list[Any] = [None]
    gloo.broadcast_object_list(told, src=0)
    with socket.create_connection(told[0]) as stream:
        return repeat(lambda: _receive(stream, data), repeats)


def _send_and_wait(stream: socket.socket, data: memoryview) -> None:
    stream.sendall(data)
    stream.recv(1)


def _receive(stream: socket.socket, data: memoryview) -> None:
    left = data
    while left:
        left = left[stream.recv_into(left) :]
    stream.sendall(b"!")


def average(
    codec: str, vectors: list[Any], addresses: list[str], num_peers: int, repeats: int, transport: str = "libp2p"
) -> list[Any]:
    """Averages each vector with the other programs, through the peer's own code."""
    with joined(codec, addresses, num_peers, transport) as average_once:
        return [repeat(lambda v=vector: average_once(v).exchange_s, repeats) for vector in vectors]


@contextmanager
def joined(
    codec: str, addresses: list[str], num_peers: int, transport: str, hosts: tuple[str, ...] = LOOPBACK,
    max_upload_mbit_s: float | None = None,
) -> Iterator[Callable[[Any], Any]]:  # fmt: skip
    """A peer that has met the others; yields what averages a vector with all of them and returns the report.

    Args:
        addresses: of a DHT node.
        transport: the way that all pairs must take.
        hosts: multiaddrs to listen on and to be dialled at.
        max_upload_mbit_s: as the option of that name.
    """
    import torch
    from hivemind.dht.crypto import RSASignatureValidator

    from hivetrain.averaging.compression import make_compressor
    from hivetrain.averaging.direct.options import DirectOptions
    from hivetrain.averaging.held import HeldState
    from hivetrain.averaging.options import PeerOptions
    from hivetrain.averaging.peer import SwarmPeer
    from hivetrain.averaging.settings import RunSettings
    from hivetrain.swarm import start_dht
    from hivetrain.swarm.identity import identity_file, load_identity

    validator = RSASignatureValidator()
    with identity_file(None) as path:
        dht = start_dht(addresses, host_maddrs=hosts, record_validators=(validator,), identity_path=path)
        identity = load_identity(path)
    direct = DirectOptions(transport, identity.peer_id, identity, hosts, hosts) if transport != "libp2p" else None
    compressor = make_compressor(codec, [torch.Size([0])])
    settings = RunSettings("vectors", 0, num_peers, codec, "none")
    options = PeerOptions(
        f"exchange-{codec}-{transport}", 10.0, ROUND_S, 60.0, None, 1.0, False, direct, max_upload_mbit_s
    )
    held = HeldState(torch.nn.Module(), torch.optim.SGD([torch.zeros(1)]), 0)  # nothing is served
    peer = SwarmPeer(dht, validator.local_public_key, settings, options, compressor.codec, held)
    epochs = itertools.count()

    def average_once(vector: Any) -> Any:
        peer.announce(next(epochs), 1, 1.0, "00" * 32, waiting=True)
        attempt = peer.start_average(compressor, vector, 1, b"", peer.view(), ROUND_S)
        report, _ = peer.finish_average(attempt, lambda: False)
        ways = set(report.links.values())
        if report.outcome != "averaged" or report.group_size != num_peers or ways != {transport}:
            raise RuntimeError(f"{report} {ways}")
        return report

    try:
        peer.open(lambda: False)
        peer.announce(0, 1, 1.0, "00" * 32, waiting=True)
        deadline = time.monotonic() + MEET_S
        while len(peer.refresh().peers) < num_peers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {len(peer.view().peers)} of {num_peers} peers met within {MEET_S:g} s")
        yield average_once
    finally:
        peer.close()
        dht.shutdown()
