"""What the programs that answer HTTP have in common: the listening socket, its URL, the file that tells it, the end.

The surprising fact: uvicorn raises the signal that stopped it once more when it is done, so SIGTERM is turned into an
exception, and what a program has opened is closed on every way out.
"""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hivetrain.errors import UserError

REQUEST_S = 12.0  # longer than any handler waits for a body, so that it can say what is wrong
_BACKLOG = 512


@contextmanager
def until_signal() -> Iterator[ExitStack]:
    """SIGTERM ends the block, and Ctrl-C as well, with KeyboardInterrupt. Enter it on the main thread.

    Yields:
        What is to be closed at the end; no signal is heeded from then on.
    """
    with suppress(_Terminated), ExitStack() as opened:
        signal.signal(signal.SIGTERM, _raise_terminated)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield opened
        finally:
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, signal.SIG_IGN)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 picks a free one.

    Raises:
        UserError: the port is taken, or the host is not an address of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        code = getattr(error, "errno", None) or 0
        reason = os.strerror(code) if code > 0 else error  # a name that cannot be resolved has a negative code
        raise UserError(f"cannot listen on {host} port {port}: {reason}; pass another --port or --host") from error


def url_of(listener: socket.socket) -> str:
    """A URL that works on this machine, also when the socket listens on all interfaces."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def http_config(app: Callable[..., Any], max_connections: int) -> uvicorn.Config:
    """How an application is served: logs are the program's own, and nobody waits long for an open connection.

    Args:
        app: the ASGI application.
        max_connections: beyond them requests are refused with status 503. One whose request is not complete within
            ``REQUEST_S`` is closed, so that silent ones cannot keep others out for ever.
    """
    return uvicorn.Config(
        app,
        http=_PromptProtocol,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # whoever claims another address would be taken for that one
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=3,
    )


@contextmanager
def address_file(path: str | os.PathLike[str] | None, content: str) -> Iterator[None]:
    """Tells other programs in a file where this one listens, until the block ends; None: nowhere.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        yield
        return
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise UserError(f"cannot write the address file {path}: {error.strerror}") from error
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)


def write_atomically(path: Path, content: str) -> None:
    """Writes a small file that is complete from the moment it exists."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _PromptProtocol(H11Protocol):
    """Closes a connection on which a request, the first or a later one, is not complete in time.

    uvicorn alone bounds the pause between two requests, and even that only until the first byte of the next one. A
    request that is complete may be answered as slowly and for as long as the application likes.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._stop()  # this was the end of a request, one that was answered before it ended
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop()
        elif self._timer is None:  # a drop now and then wins no time
            self._timer = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _raise_terminated(_signum: int, _frame: FrameType | None) -> None:
    raise _Terminated
