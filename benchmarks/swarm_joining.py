"""What a peer costs its machine: time to join, memory, and the digest of its params.

The training thread of a miner waits for all of it once (the join) or once in each global update (the digest).
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

from swarm_programs import meeting_point, programs, questions, table

MIB = 2**20
WIDTH = 1000
MEET_S = 60.0
DIGEST_TOKENS = 1024


def measure(num_params: int, joins: int, digest_layers: int, digest_width: int) -> str:
    """Three tables."""
    with meeting_point() as addresses, programs(work, 2, num_params, addresses, fresh=True) as (host, guest):
        host.ask(what="begin", peers=1)
        host.answer()
        times = []
        for _ in range(joins):
            guest.ask(what="begin", peers=2)
            times.append(guest.answer())
            guest.ask(what="memory")
            memory = guest.answer()
            guest.ask(what="end")
            guest.answer()
        host.hang_up()
        guest.ask(what="digest", layers=digest_layers, width=digest_width)
        digest = guest.answer(600)
    return "\n\n".join((_join_table(times, num_params), _memory_table(memory, num_params), _digest_table(digest)))


def _join_table(times: list[dict[str, float]], num_params: int) -> str:
    header = [
        f"joining with {num_params / 1e6:g}M params and Adam's state, s",
        f"median of {len(times)}",
        "least",
        "most",
    ]
    rows = []
    for name in times[0]:
        values = [time[name] for time in times]
        rows.append([name, *(f"{f(values):.2f}" for f in (statistics.median, min, max))])
    return table(header, rows)


def _memory_table(memory: list[tuple[str, float, float]], num_params: int) -> str:
    rows = [[name, f"{rss:.0f}", f"{pss:.0f}"] for name, rss, pss in memory]
    total = ["sum", *(f"{sum(entry[i] for entry in memory):.0f}" for i in (1, 2))]
    tensors = 16 * num_params / MIB
    note = (
        f"Params, gradients and Adam's moments take {tensors:.0f} MiB of it, the gathered gradient a quarter as much."
    )
    header = [f"process of a peer with {num_params / 1e6:g}M params", "RSS, MiB", "of it its own share (PSS), MiB"]
    return f"{table(header, [*rows, total])}\n\n{note}"


def _digest_table(digest: dict[str, float]) -> str:
    header = ["", "seconds", "of a microbatch"]
    step_s = digest["microbatch_s"]
    return table(
        header,
        [
            [f"params_digest of {digest['params'] / 1e6:.0f}M params, fp32", f"{digest['digest_s']:.3f}",
             f"{digest['digest_s'] / step_s:.1%}"],
            [f"one microbatch of {DIGEST_TOKENS} tokens, forward and backward, all cores", f"{step_s:.2f}", "100 %"],
            ["AdamW's update", f"{digest['update_s']:.2f}", f"{digest['update_s'] / step_s:.1%}"],
        ],
    )  # fmt: skip


def work(connection: Connection, rank: int, num_params: int, addresses: list[str]) -> None:
    """A peer that begins, tells its memory, and ends, as it is asked; or one that takes digests."""
    import torch

    torch.optim.AdamW([torch.zeros(1)])  # the first one in a process imports for seconds, in a swarm or not
    close: Callable[[], Any] = dict
    for asked in questions(connection):
        if asked["what"] == "begin":
            torch.set_num_threads(1)
            answer, close = _begin(num_params, addresses, asked["peers"])
        elif asked["what"] == "memory":
            answer = _memory()
        elif asked["what"] == "digest":
            answer = _digest(asked["layers"], asked["width"])
        else:
            answer, close = close(), dict
        connection.send(answer)
    close()


def _begin(num_params: int, addresses: list[str], peers: int) -> tuple[dict[str, float], Callable[[], None]]:
    import torch
    from hivemind.dht.crypto import RSASignatureValidator

    from hivetrain.averaging.collaboration import Collaboration
    from hivetrain.averaging.options import PeerOptions
    from hivetrain.averaging.peer import SwarmPeer
    from hivetrain.averaging.settings import RunSettings
    from hivetrain.averaging.state import schema_of
    from hivetrain.averaging.watch import Watchers
    from hivetrain.swarm import start_dht

    width = WIDTH if num_params >= WIDTH**2 else int(num_params**0.5)
    layers = (torch.nn.Linear(width, width, bias=False) for _ in range(max(1, num_params // width**2)))
    module = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    collaboration = Collaboration(
        module, optimizer, target_batch_size=1, policy="retry", matchmaking_time_s=3.0, averaging_timeout_s=60.0,
        overlap=False, compression="none", on_epoch=lambda epoch: None, on_report=lambda report: None,
        watchers=Watchers(), keep_updates_bytes=0,
    )  # fmt: skip
    settings = RunSettings(schema_of(module), collaboration.accumulator.numel, 1, "none", "AdamW")
    options = PeerOptions("joining", 3.0, 60.0, 30.0, None, 1.0, False)
    validator = RSASignatureValidator()
    marks = [time.monotonic()]
    dht = start_dht(addresses, record_validators=(validator,))
    marks.append(time.monotonic())
    peer = SwarmPeer(
        dht, validator.local_public_key, settings, options, collaboration.compressor.codec, collaboration.held
    )
    peer.open(lambda: False)
    marks.append(time.monotonic())
    collaboration.begin(peer)
    marks.append(time.monotonic())
    if peers == 1:  # somebody has to have a state to give
        for param in module.parameters():
            param.grad = torch.randn_like(param)
        collaboration.add(1)
        collaboration.advance(optimizer.step)
    if collaboration.epoch != 1 or len(optimizer.state) != len(list(module.parameters())):
        raise RuntimeError(f"at epoch {collaboration.epoch} with {len(optimizer.state)} states: this was no join")

    def close() -> None:
        collaboration.end()
        peer.close()
        dht.shutdown()

    names = ("start of the DHT node", "finding the run", "download of the state, check and load")
    seconds = {name: after - before for name, (before, after) in zip(names, pairwise(marks), strict=True)}
    return seconds | {"all of it": marks[-1] - marks[0]}, close


def _memory() -> list[tuple[str, float, float]]:
    import psutil

    own = psutil.Process(os.getpid())
    found = [("training", own)]
    for child in own.children(recursive=True):
        found.append((child.name() if child.name() in ("p2pd", "torch_shm_manager") else "DHT node", child))
    memory = []
    for name, process in found:
        with suppress(psutil.NoSuchProcess):
            info = process.memory_full_info()
            memory.append((name, info.rss / MIB, info.pss / MIB))
    return memory


def _digest(layers: int, width: int) -> dict[str, float]:
    import torch

    from hivetrain.averaging.state import params_digest
    from hivetrain.model import CausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = CausalLM(config={"n_layer": layers, "n_embd": width, "n_head": max(1, width // 64)})
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {"input_ids": torch.randint(0, 50257, (1, DIGEST_TOKENS))}
    model.loss(batch).backward()
    optimizer.step()
    return {
        "params": float(sum(param.numel() for param in model.parameters())),
        "digest_s": _median_s(lambda: params_digest(model), 5),
        "microbatch_s": _median_s(lambda: model.loss(batch).backward(), 3),
        "update_s": _median_s(optimizer.step, 3),
    }


def _median_s(function: Callable[[], Any], times: int) -> float:
    taken = []
    for _ in range(times):
        start = time.monotonic()
        function()
        taken.append(time.monotonic() - start)
    return statistics.median(taken)
