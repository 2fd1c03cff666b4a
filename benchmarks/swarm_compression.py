"""What compression saves in bytes and costs in loss, after the same samples.

No network and no clock: the peers' gradients go through the compressors and the exchange of the package in one process,
message by message. Since all members of a round end with the same result, one model stands for all of them.
"""

import asyncio
import itertools
import statistics
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from swarm_programs import MB, Program, programs, questions, table

CLIP_NORM = 1.0
PART_TIMEOUT_S = 60.0
HOUR_S = 3600.0


@dataclass(frozen=True)
class Task:
    """What is trained: a GPT on the embedded corpus, by so many peers."""

    updates: int
    peers: int = 2
    batch_size: int = 4
    block_size: int = 128
    layers: int = 2
    width: int = 256
    learning_rate: float = 1e-3
    val_blocks: int = 64


def measure(compressions: Sequence[str], task: Task) -> str:
    """A table; the first compression is what the others are compared with."""
    asked = [*((name, 0) for name in compressions), (compressions[0], 1)]
    with programs(work, 2, asdict(task)) as pair:
        answers = _share_out(pair, asked)
    first = answers[0]
    rows = []
    for (name, seed), answer in zip(asked, answers, strict=True):
        rows.append(
            [
                f"{name}, other initial params" if seed else name,
                f"{answer['bytes'] / MB:.3f}",
                f"{first['bytes'] / answer['bytes']:.1f}x",
                f"{answer['train_loss']:.4f}",
                f"{answer['train_loss'] / first['train_loss'] - 1:+.2%}",
                f"{answer['val_loss']:.4f}",
                f"{answer['val_loss'] / first['val_loss'] - 1:+.2%}",
            ]
        )
    header = ["compression", "MB per peer and update, up + down", "fewer", "training loss, last tenth", "against none",
              "held-out loss", "against none"]  # fmt: skip
    samples = task.updates * task.peers * task.batch_size
    note = (
        f"GPT-2 with {task.layers} layers of width {task.width} ({first['params'] / 1e6:.1f}M params), "
        f"{task.peers} peers, {task.updates} updates, {samples} samples of {task.block_size} tokens, gradients clipped "
        f"at {CLIP_NORM:g}."
    )
    return f"{table(header, rows)}\n\n{note}"


def _share_out(pair: Sequence[Program], asked: Sequence[tuple[str, int]]) -> list[dict[str, float]]:
    answers = []
    for start in range(0, len(asked), len(pair)):
        busy = list(zip(pair, asked[start : start + len(pair)], strict=False))
        for program, (name, seed) in busy:
            program.ask(compression=name, seed=seed)
        for program, question in busy:
            answers.append(program.answer(HOUR_S))
            print(f"{question}: {answers[-1]}", file=sys.stderr)
    return answers


def work(connection: Connection, rank: int, task: dict[str, Any]) -> None:
    """Trains once for each question."""
    import torch

    torch.set_num_threads(1)
    for asked in questions(connection):
        connection.send(_train(Task(**task), asked["compression"], asked["seed"]))


def _train(task: Task, compression: str, seed: int) -> dict[str, float]:
    import torch

    from hivetrain.averaging.accumulator import GradientAccumulator
    from hivetrain.averaging.compression import make_compressor
    from hivetrain.data import RefinedWebDataModule
    from hivetrain.model import CausalLM

    data = [
        RefinedWebDataModule(
            block_size=task.block_size, batch_size=task.batch_size, slot=slot, val_blocks=task.val_blocks
        )
        for slot in range(task.peers)
    ]
    for module in data:
        module.setup("fit")
    streams = [itertools.chain.from_iterable(itertools.repeat(module.train_dataloader())) for module in data]
    torch.manual_seed(seed)
    config = {"n_layer": task.layers, "n_embd": task.width, "n_head": task.width // 64, "n_positions": task.block_size}
    model = CausalLM(
        config=config, vocab_size=data[0].vocabulary_size, learning_rate=task.learning_rate,
        warmup_epochs=max(1, task.updates // 20), total_epochs=task.updates,
    )  # fmt: skip
    configured: Any = model.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    accumulator = GradientAccumulator(param for group in optimizer.param_groups for param in group["params"])
    compressors = [make_compressor(compression, accumulator.shapes) for _ in data]
    losses, bytes_moved = [], 0
    for update in range(task.updates):
        gradients = []
        for stream in streams:
            loss = model.loss(next(stream))
            loss.backward()
            losses.append(loss.item())
            accumulator.add(task.batch_size)
            gradients.append(accumulator.mean())
            accumulator.reset()
            optimizer.zero_grad()
        stages = [made.stages(gradient, update) for made, gradient in zip(compressors, gradients, strict=True)]
        average, moved = asyncio.run(_exchange(stages, compressors[0].codec))
        bytes_moved += moved
        for compressor in compressors:
            compressor.commit()
        accumulator.put(average)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        held_out = statistics.fmean(model.loss(batch).item() for batch in data[0].val_dataloader())
    tenth = max(1, len(losses) // 10)
    return {
        "params": float(accumulator.numel),
        "bytes": bytes_moved / task.updates / task.peers,
        "train_loss": statistics.fmean(losses[-tenth:]),
        "val_loss": held_out,
    }


async def _exchange(stages: list[Any], codec: Any) -> tuple[Any, int]:
    """Runs all members of one round; returns what they all hold, and the bytes that they moved together."""
    from hivetrain.averaging.layout import Layout
    from hivetrain.averaging.staged import StagedExchange
    from hivetrain.averaging.transport import Channel

    number = len(stages)

    def layout(numel: int) -> Layout:
        return Layout.split(numel, [numel * (i + 1) // number - numel * i // number for i in range(number)])

    members = [
        StagedExchange(me, [1.0] * number, layout, at_work, codec, PART_TIMEOUT_S) for me, at_work in enumerate(stages)
    ]

    class InMemory(Channel):
        name = "memory"

        def __init__(self, me: int, member: int) -> None:
            self.me, self.member = me, member

        async def exchange(self, stage: int, exchange: Any) -> None:
            async def open_stream(_: int, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
                async with aclosing(members[self.member].serve(stage, self.me, parts)) as answers:
                    async for answer in answers:
                        yield answer

            await exchange.talk_over(open_stream, self.member)

        async def vote(self, ballot: bytes) -> bytes:
            raise NotImplementedError

    averages = await asyncio.gather(
        *(member.run({other: InMemory(me, other) for other in range(number)}) for me, member in enumerate(members))
    )
    if any(not average.equal(averages[0]) for average in averages):
        raise RuntimeError("the members of a round hold different results")
    return averages[0], sum(member.traffic.sent + member.traffic.received for member in members)
