"""Child programs of the demo, each in a process group of its own, and their certain end.

Own groups mean that killing one miner with everything it started leaves the others alone, and that Ctrl-C reaches only
the demo, which then ends the rest in order.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_TERM_S = 5.0  # with the next one within the time that a program has to end
_KILL_S = 1.5


class Fleet:
    """Starts ``hivetrain`` commands and ends them all on exit.

    Args:
        logs: directory for one log file per program.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Fleet":
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Starts ``hivetrain ARGUMENTS`` with one processor thread, its output going to ``NAME.log``."""
        with (self._logs / f"{name}.log").open("wb") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", "hivetrain.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def exit_code(self, name: str) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._children[name].poll()

    def pid(self, name: str) -> int:
        """Process id, which is also the id of its process group."""
        return self._children[name].pid

    def log_tail(self, name: str, lines: int = 5) -> str:
        """The last lines of a program's log."""
        text = (self._logs / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """Ends all programs and what they started: politely, and after some seconds by force."""
        self._signal(signal.SIGTERM)
        self._wait(_TERM_S)
        self._signal(signal.SIGKILL)
        self._wait(_KILL_S)

    def _signal(self, signum: int) -> None:
        for child in self._children.values():
            if child.poll() is None or signum == signal.SIGKILL:  # a dead leader's group may still have members
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signum)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
