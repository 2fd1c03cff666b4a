"""Checks with deadlines, and what they found.

Surprising fact: a check that hangs cannot be ended from outside, so it is left behind on a daemon thread and reported
as a failure; the ones after it run all the same.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hivetrain.logs import one_line

MAX_DETAIL_CHARS = 400


class Status(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARN = "warn"  # works, but is probably not what was meant
    FAIL = "fail"
    SKIPPED = "skipped"  # the configuration asks for nothing of the kind


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        status: what it came to.
        detail: what was seen, one line.
        advice: what to do; "" if nothing.
        check: name of the check.
        seconds: how long it took.
    """

    status: Status
    detail: str
    advice: str = ""
    check: str = ""
    seconds: float = 0.0


def ok(detail: str) -> Finding:
    return Finding(Status.OK, detail)


def warn(detail: str, advice: str) -> Finding:
    return Finding(Status.WARN, detail, advice)


def fail(detail: str, advice: str) -> Finding:
    return Finding(Status.FAIL, detail, advice)


def skipped(detail: str) -> Finding:
    return Finding(Status.SKIPPED, detail)


@dataclass(frozen=True)
class Check:
    """One question.

    Args:
        name: what it is about, one word or two.
        run: answers it; whatever it raises is a failure.
        timeout_s: the longest it may take.
        advice: what to do when it raises or takes too long.
    """

    name: str
    run: Callable[[], Finding]
    timeout_s: float
    advice: str


def run_checks(lanes: Sequence[Sequence[Check]], timeout_s: float) -> list[Finding]:
    """Run lanes side by side and the checks of a lane one after the other; all end within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    findings: list[list[Finding]] = [[] for _ in lanes]

    def work(lane: Sequence[Check], found: list[Finding]) -> None:
        for check in lane:
            found.append(_bounded(check, deadline))

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(lanes, findings, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [finding for found in findings for finding in found]


def _bounded(check: Check, deadline: float) -> Finding:
    started_at = time.monotonic()
    limit_s = min(check.timeout_s, deadline - started_at)
    if limit_s <= 0:
        return replace(fail("not checked: the time was up", "mend what took so long, and ask again"), check=check.name)
    answers: list[Finding] = []

    def ask() -> None:
        try:
            answers.append(check.run())
        except Exception as error:  # any failure of a check is an answer
            answers.append(fail(" ".join(str(error).split()) or type(error).__name__, check.advice))

    thread = threading.Thread(target=ask, name=f"doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    answer = answers[0] if answers else fail(f"no answer within {limit_s:.0f} s", check.advice)
    detail = one_line(answer.detail, MAX_DETAIL_CHARS)  # a part of it may be a server's words
    return replace(answer, detail=detail, check=check.name, seconds=round(time.monotonic() - started_at, 2))
