"""One program of the exchange benchmark: sends a random vector by each of the ways, and says how long it took.

Nobody trains here. hivetrain's way is that of :class:`SwarmPeer`, as a peer averages at the end of a global batch; the
time is that of exchange and vote, without matchmaking.
"""

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from swarm_programs import MB, cpu_seconds, questions

ROUND_S = 120.0
MEET_S = 60.0
SETTLE_S = 0.3
LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
TRANSPORTS = {"libp2p": "libp2p", "plain": "direct-plain", "tls": "direct"}


def work(connection: Connection, rank: int, num_peers: int, store: str, addresses: list[str]) -> None:
    """One member."""
    import torch
    import torch.distributed as gloo

    torch.set_num_threads(1)
    gloo.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_peers)
    try:
        for asked in questions(connection):
            generator = torch.Generator().manual_seed(rank)
            vectors = [torch.randn(numel, generator=generator) for numel in asked["sizes"]]
            part, codec, repeats = asked["part"], asked["codec"], asked["repeats"]
            if part == "raw":
                answer = [send_raw(vector, rank, repeats) for vector in vectors]
            elif part == "gloo":
                answer = [repeat(lambda v=vector: gloo.all_reduce(v), repeats) for vector in vectors]
            elif part == "hivemind":
                answer = [average_by_hivemind(codec, vector, addresses, num_peers, repeats) for vector in vectors]
            else:
                answer = average(codec, vectors, addresses, num_peers, repeats, TRANSPORTS[part])
            connection.send(answer)
    finally:
        gloo.destroy_process_group()


def repeat(once: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Times ``once``; what it returns, if anything, counts instead. The first time is a warm-up."""
    import torch.distributed as gloo

    seconds, spent, used_kb = [], {}, {}
    for number in range(repeats + 1):
        time.sleep(SETTLE_S)  # an exchange comes after a pause, in a training too
        gloo.barrier()
        if number == 1:
            spent, used_kb = cpu_seconds(), _forget_peak_memory()
        start = time.monotonic()
        told_s = once()
        seconds.append(time.monotonic() - start if told_s is None else told_s)
    cpu = {name: now - spent[name] for name, now in cpu_seconds().items()}
    grown_kb = sum(_memory_kb(pid, "VmHWM") - before_kb for pid, before_kb in used_kb.items())
    return {"seconds": seconds[1:], "cpu": cpu, "memory_mb": grown_kb * 1024 / MB}


def _memory_kb(pid: int, name: str) -> int:
    """A figure of a process's memory; 0 where the system does not tell."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
    return 0


def _forget_peak_memory() -> dict[int, int]:
    """Begins to look for the peak anew; the kilobytes now in use by this process and by each one below it."""
    import psutil

    used_kb = {}
    for pid in [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]:
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            used_kb[pid] = _memory_kb(pid, "VmRSS")
    return used_kb


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
    with joined(codec, addresses, num_peers, transport, before_exchange=settle) as average_once:
        return [repeat(lambda v=vector: average_once(v).exchange_s, repeats) for vector in vectors]


async def settle() -> None:
    """Lets the DHT's processes end what matchmaking has left to them, and all members begin together, as gloo's do."""
    import torch.distributed as gloo

    await asyncio.sleep(SETTLE_S)
    await asyncio.to_thread(gloo.barrier)


async def at_once() -> None:
    """Does not wait."""


@contextmanager
def joined(
    codec: str, addresses: list[str], num_peers: int, transport: str, hosts: tuple[str, ...] = LOOPBACK,
    max_upload_mbit_s: float | None = None, before_exchange: Callable[[], Coroutine[Any, Any, None]] = at_once,
) -> Iterator[Callable[[Any], Any]]:  # fmt: skip
    """A peer that has met the others; yields what averages a vector with all of them and returns the report.

    Args:
        addresses: of a DHT node.
        transport: the way that all pairs must take.
        hosts: multiaddrs to listen on and to be dialled at.
        max_upload_mbit_s: as the option of that name.
        before_exchange: awaited between matchmaking and exchange.
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
        run_round = peer._averager._run_round

        async def run_later(*args: Any) -> Any:
            await before_exchange()
            return await run_round(*args)

        peer._averager._run_round = run_later
        peer.announce(0, 1, 1.0, "00" * 32, waiting=True)
        deadline = time.monotonic() + MEET_S
        while len(peer.refresh().peers) < num_peers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"only {len(peer.view().peers)} of {num_peers} peers met within {MEET_S:g} s")
        yield average_once
    finally:
        peer.close()
        dht.shutdown()


def average_by_hivemind(codec: str, vector: Any, addresses: list[str], num_peers: int, repeats: int) -> dict[str, Any]:
    """hivemind's own averager; its time is taken in its own process, from the group to the end of the all-reduce."""
    import multiprocessing

    from hivemind.averaging import DecentralizedAverager
    from hivemind.compression import Float16Compression, NoCompression

    from hivetrain.swarm import start_dht

    class Timed(DecentralizedAverager):
        seconds = multiprocessing.Value("d", 0.0)

        async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Any:
            await asyncio.sleep(SETTLE_S)
            start = time.monotonic()
            try:
                return await super()._aggregate_with_group(*args, **kwargs)
            finally:
                self.seconds.value = time.monotonic() - start

    multiprocessing.set_start_method("fork", force=True)  # hivemind's own; a local class cannot be pickled
    dht = start_dht(addresses)
    averager = Timed(
        [vector], dht, start=True, prefix=f"hivemind{codec}{vector.numel()}", target_group_size=num_peers,
        min_group_size=num_peers, min_matchmaking_time=5.0, request_timeout=1.0,
        compression=Float16Compression() if codec == "fp16" else NoCompression(),
    )  # fmt: skip

    def once() -> float:
        deadline = time.monotonic() + ROUND_S
        while time.monotonic() < deadline:
            found = averager.step(timeout=ROUND_S)
            if found is not None and len(found) == num_peers:
                return Timed.seconds.value
        raise TimeoutError("hivemind found no group")

    try:
        return repeat(once, repeats)
    finally:
        averager.shutdown()
        dht.shutdown()
