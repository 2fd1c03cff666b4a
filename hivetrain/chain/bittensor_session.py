"""Connections to a Bittensor node: deadlines, reconnects with jittered pauses, and what was on its way when one broke.

Surprising fact: every connection has an event loop and a thread of its own. The SDK leaves its connection task behind
when a connect is cancelled; ending the whole loop is the one way to give back the socket of a node that never answers.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import bittensor as bt
from bittensor.settings import default_fallback_endpoints, resolve_endpoint

from hivetrain.chain.base import Code, Deadline, LedgerError, Outcome, Receipt
from hivetrain.chain.calls import LoopThread
from hivetrain.chain.pallet import code_of

T = TypeVar("T")

# The pool's words for a transaction that lost a race with another of the same key, and was surely not taken.
_NOT_TAKEN = {"Stale", "Future"}
# Its words for one that may be in a block all the same, itself or an equal one sent before.
_UNDECIDED = {"PriorityTooLow", "AlreadyImported", "Usurped", "Dropped", "Retracted", "FinalityTimeout", "Invalid"}

BACKOFF_S = 0.5
BACKOFF_MAX_S = 30.0
POLICY_HOLD_S = 60.0


@dataclass
class Progress:
    """How far a write came, for when its answer is lost.

    Args:
        sent: from now on a transaction may be on its way.
        before: the hotkey's last update when it was sent.
        receipt: what the caller gets when the transaction turns out to have landed.
    """

    sent: bool = False
    before: int = 0
    receipt: Receipt = field(default_factory=lambda: Receipt(Outcome.APPLIED))


class Session:
    """One connection of one process: chain access, SDK client, and the loop they live on."""

    def __init__(self, network: str, access: Any) -> None:
        self.owner = os.getpid()
        self.substrate = _Watched(access)
        self.client = bt.Client(network, substrate=self.substrate)
        self._loop = LoopThread("bittensor")
        self._connecting = asyncio.Lock()

    def run(self, work: Callable[["Session"], Coroutine[Any, Any, T]], timeout_s: float, progress: Progress) -> T:
        """Connect if need be and run ``work``; raises what the SDK raises, and TimeoutError."""

        async def connected() -> T:
            _CURRENT.set(progress)
            async with self._connecting:
                await self.substrate.connect()
            return await work(self)

        try:
            return self._loop.call(connected, timeout_s)
        except LedgerError as error:
            if error.code == Code.CLOSED and self._loop.closed:
                raise AnswerLost("another call gave up this connection") from None
            raise

    async def send(self, sending: Coroutine[Any, Any, Any], progress: Progress) -> Receipt:
        """Await a transaction and turn its result into a receipt or a LedgerError."""
        result = await sending
        if not result.success:
            name = result.error and result.error.name
            if name in _NOT_TAKEN:
                progress.sent = False
            if name is None or name in _NOT_TAKEN | _UNDECIDED:
                hint = f"the pool did not say that the transaction took place: {result.message or name}"
                raise LedgerError(Code.UNREACHABLE, hint[:300])
            raise translated(result.error)
        block = str(result.extrinsic_id or "").partition("-")[0]
        receipt = progress.receipt
        return Receipt(receipt.outcome, int(block) if block.isdigit() else None, receipt.dropped)

    def end(self, wait_s: float) -> None:
        self._loop.close(self.substrate.close, wait_s)


class Sessions:
    """The live connection of one chain object, and a new one after each that broke.

    Args:
        network: name or URL, for the messages.
        access: makes the chain access of a new session.
        jitter: random numbers from 0 to 1, so that many clients do not reconnect at once.
    """

    def __init__(self, network: str, access: Callable[[], Any], jitter: Callable[[], float]) -> None:
        self._network = network
        self._access = access
        self._jitter = jitter
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._session: Session | None = None
        self._parents: list[Session | None] = []  # never closed here: see calls.py on forks
        self._failures = 0
        self._not_before = 0.0
        self._reason = ""

    def call(
        self, work: Callable[[Session], Coroutine[Any, Any, T]], timeout_s: float, progress: Progress | None = None
    ) -> T:
        """Run ``work`` on a live session; it is tried again on a new one until the deadline, unless it sent something.

        Raises:
            LedgerError: whatever went wrong.
        """
        deadline, progress = Deadline(timeout_s, time.monotonic), progress or Progress()
        while True:
            self._await_turn(deadline)
            session = self._open()
            try:
                result = session.run(work, deadline.check("connecting"), progress)
            except TimeoutError:
                self._drop(session, f"no answer in {timeout_s:g} s")
                raise LedgerError(Code.UNREACHABLE, f"{self._network} did not answer in {timeout_s:g} s") from None
            except bt.RpcPolicyError as error:
                self._drop(session, str(error), _seconds(error.retry_after))
                raise LedgerError(Code.UNREACHABLE, f"{self._network} refuses traffic for now: {error}") from error
            except (bt.RpcConnectionError, bt.ConnectionNotReady, OSError, AnswerLost) as error:
                self._broke(session, error, progress)
            except bt.ChainError as error:
                if error.name is not None or error.code != bt.ErrorCode.UNKNOWN:
                    raise translated(error) from error
                self._broke(session, error, progress)
            except bt.BittensorError as error:
                raise LedgerError(Code.INCOMPATIBLE, f"the SDK refused the call: {error}") from error
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                hint = f"SDK {bt.__version__} and the runtime of {self._network} do not match: {error!r}"
                raise LedgerError(Code.INCOMPATIBLE, hint) from error
            else:
                self._failures = 0
                return result

    def pause(self, seconds: float) -> None:
        """Wait; raises CLOSED as soon as :meth:`close` is called."""
        if self._closed.wait(max(0.0, seconds)):
            raise LedgerError(Code.CLOSED, "this chain was closed")

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.end(wait_s=2.5)

    def _broke(self, session: Session, error: Exception, progress: Progress) -> None:
        self._drop(session, str(error))
        if progress.sent:
            raise LedgerError(Code.UNREACHABLE, f"the answer was lost after sending: {error}") from error

    def _await_turn(self, deadline: Deadline) -> None:
        wait = self._not_before - time.monotonic()
        if wait > deadline.check("waiting to reconnect"):
            hint = f"{self._network} is not reachable ({self._reason}); the next attempt is in {wait:.1f} s"
            raise LedgerError(Code.UNREACHABLE, hint)
        self.pause(wait)

    def _open(self) -> Session:
        with self._lock:
            if self._closed.is_set():
                raise LedgerError(Code.CLOSED, "this chain was closed")
            if self._session is None or self._session.owner != os.getpid():
                self._parents.append(self._session)
                self._session = Session(self._network, self._access())
            return self._session

    def _drop(self, session: Session, reason: str, hold_s: float | None = None) -> None:
        """End a broken session; the next may start after a jittered pause that doubles with each failure."""
        with self._lock:
            if self._session is session:
                self._session, self._reason = None, reason[:200]
                pause = min(BACKOFF_MAX_S, BACKOFF_S * 2**self._failures) * (0.5 + self._jitter() / 2)
                self._failures = min(self._failures + 1, 10)
                self._not_before = time.monotonic() + (pause if hold_s is None else hold_s)
        session.end(wait_s=0.2)


def connect_to(network: str) -> Any:
    """Chain access over a websocket, with the network's public fallback endpoints."""
    label, endpoint = resolve_endpoint(network)
    fallbacks = [url for url in default_fallback_endpoints(label) if url != endpoint]
    return bt.RpcSubstrate(endpoint, fallback_endpoints=fallbacks, retry_forever=False)


def translated(error: Any) -> LedgerError:
    """A chain error of the SDK as ours."""
    kind = getattr(error.code, "value", str(error.code))
    return LedgerError(code_of(error.name, kind), f"{error.name or kind}: {error.message}"[:300])


class AnswerLost(Exception):
    """The connection went while a call was under way."""


_CURRENT: ContextVar[Progress] = ContextVar("progress")


class _Watched:
    """Chain access that notes the moment from which a transaction may be on its way."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def submit(self, *args: Any, **options: Any) -> Any:
        _CURRENT.get().sent = True
        return await self._inner.submit(*args, **options)


def _seconds(retry_after: Any) -> float:
    try:
        return min(3600.0, max(0.0, float(retry_after)))
    except (TypeError, ValueError):
        return POLICY_HOLD_S
