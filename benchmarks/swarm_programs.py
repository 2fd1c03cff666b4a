"""The programs of the swarm benchmark: started, asked, answered for, and ended with everything below them.

Each is a process of its own that takes questions from a pipe until the pipe closes. They are forked from one server
that has imported everything, so they share its memory; those whose memory is looked at are started afresh.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

START_S = 120.0
PRELOADED = ["hivetrain.strategies", "hivetrain.model", "hivetrain.data"]
MB = 1e6

# A program's main function: its pipe, then whatever it was given.
Main = Callable[..., None]


class Program:
    """One process with a pipe to it."""

    def __init__(self, main: Main, name: str, args: Sequence[Any], fresh: bool) -> None:
        context: Any = multiprocessing.get_context("spawn" if fresh else "forkserver")
        if not fresh:
            context.set_forkserver_preload(PRELOADED)
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, *args), name=name)
        self._process.start()
        theirs.close()

    def ask(self, **question: Any) -> None:
        self._ours.send(question)

    def answer(self, timeout_s: float = START_S) -> Any:
        """Waits for the next answer. Raises EOFError if the program died; its own message is on stderr."""
        if not self._ours.poll(timeout_s):
            raise TimeoutError(f"{self._process.name} gave no answer within {timeout_s:.0f} s")
        return self._ours.recv()

    def hang_up(self) -> None:
        self._ours.close()

    def end(self) -> None:
        self._process.join(15)
        for force in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                force()
                self._process.join(5)


@contextmanager
def programs(main: Main, number: int, *args: Any, fresh: bool = False) -> Iterator[list[Program]]:
    """Starts ``number`` programs, each with its rank before ``args``, and waits until all are up."""
    started: list[Program] = []
    try:
        for rank in range(number):
            started.append(Program(main, f"{main.__name__}-{rank}", (rank, *args), fresh))
        for program in started:
            program.answer()
        yield started
    finally:
        for program in started:
            program.hang_up()
        for program in started:
            program.end()


def questions(connection: Connection) -> Iterator[dict[str, Any]]:
    """Says that the program is up, then yields what it is asked, until the benchmark hangs up."""
    connection.send("up")
    with suppress(EOFError):
        while True:
            yield connection.recv()


@contextmanager
def meeting_point() -> Iterator[list[str]]:
    """Addresses of a DHT node, through which all programs find each other."""
    from hivetrain.swarm import start_dht, visible_maddrs

    dht = start_dht([])
    try:
        yield visible_maddrs(dht)
    finally:
        dht.shutdown()


def cpu_seconds() -> dict[str, float]:
    """Processor seconds so far of this process and of each of its kinds of descendants."""
    import psutil

    own = os.times()
    spent = {"python": own.user + own.system, "dht": 0.0, "p2pd": 0.0}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            spent["p2pd" if child.name().startswith("p2pd") else "dht"] += times.user + times.system
    return spent


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; the first column is text, the others are figures."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
