"""A ledger served to other hosts: POST /v1/<call>, every request signed by a hotkey (btauth/1).

Surprising fact: nonces are remembered in the ledger file itself, so a request accepted by one server process cannot be
replayed at another one that serves the same file.
"""

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from hivetrain import serving
from hivetrain.chain import wire
from hivetrain.chain.base import Code, Deadline, LedgerError
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.weights import parse_weights
from hivetrain.keys import Hotkey, RequestRefused, verify_request

logger = logging.getLogger(__name__)

CALL_S = 10.0
_MAX_CONNECTIONS = 256
Answer = dict[str, Any]


def build_app(ledger: Ledger, key: Hotkey, now_ns: Callable[[], int] = time.time_ns) -> FastAPI:
    """The web application of one ledger.

    Args:
        ledger: what is served; stays the caller's to close.
        key: the server's own hotkey; requests addressed to another are refused.
        now_ns: nanoseconds since 1970, for the age of requests.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.get("/v1/hotkey")
    def hotkey() -> Response:
        return _json(200, {"hotkey": key.address})

    @app.post("/v1/{name}")
    async def call(name: str, request: Request) -> Response:
        try:
            async with asyncio.timeout(CALL_S):
                body = await _read_body(request)
        except TimeoutError:
            return _json(408, {"refused": "the body did not arrive in time"})
        except ValueError as error:
            return _json(413, {"refused": str(error)})
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        facts = {"method": "POST", "path": target, "receiver": key.address}
        return await run_in_threadpool(_answer, ledger, name, dict(request.headers), body, facts, now_ns())

    return app


class LedgerServer:
    """Serves a ledger from a thread, between ``__enter__`` and ``__exit__``.

    Args:
        ledger: what is served.
        key: the server's own hotkey.
        host: address to listen on.
        port: port to listen on, 0 for any free one; ``url`` tells it after ``__enter__``.
    """

    def __init__(self, ledger: Ledger, key: Hotkey, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = uvicorn.Server(serving.http_config(build_app(ledger, key), _MAX_CONNECTIONS))
        self._address = (host, port)
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return serving.url_of(self._bind())

    def __enter__(self) -> "LedgerServer":
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._bind()]}, name="ledger-server", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(5)
        self._bind().close()

    def run(self) -> None:
        """Serve on this thread until SIGINT or SIGTERM."""
        with self._bind() as listening:
            self._server.run(sockets=[listening])

    def _bind(self) -> socket.socket:
        if self._socket is None:
            self._socket = serving.listen(*self._address)
        return self._socket


class _LedgerNonces:
    def __init__(self, ledger: Ledger, deadline: Deadline) -> None:
        self._ledger, self._deadline = ledger, deadline

    def accept(self, address: str, nonce_ns: int, now_ns: int) -> bool:
        return self._ledger.accept_nonce(address, nonce_ns, now_ns, self._deadline)


def _answer(
    ledger: Ledger, name: str, headers: dict[str, str], body: bytes, facts: dict[str, str], now_ns: int
) -> Response:
    deadline = Deadline(CALL_S, time.monotonic)
    handler = _CALLS.get(name)
    if handler is None:
        return _json(404, {"refused": "there is no such call"})
    try:
        nonces = _LedgerNonces(ledger, deadline)
        sender = verify_request(headers, body, nonces=nonces, now_ns=now_ns, **facts)
        return _json(200, handler(ledger, sender, wire.loads(body), deadline))
    except RequestRefused as error:
        return _json(401, {"refused": str(error)})
    except LedgerError as error:
        return _json(403 if error.code == Code.NOT_REGISTERED else 409, {"error": wire.error_to_dict(error)})
    except ValueError as error:
        return _json(400, {"refused": str(error)[:200]})


def _snapshot(ledger: Ledger, _sender: str, _args: Answer, deadline: Deadline) -> Answer:
    return wire.snapshot_to_dict(ledger.snapshot(deadline))


def _clock(ledger: Ledger, _sender: str, _args: Answer, deadline: Deadline) -> Answer:
    block, next_s = ledger.clock(deadline)
    return {"block": block, "next_s": next_s}


def _block_hash(ledger: Ledger, _sender: str, args: Answer, deadline: Deadline) -> Answer:
    block = wire.typed(args, "block", int)
    return {"hash": ledger.block_hash(block, deadline) if 0 <= block < 1 << 62 else None}


def _weights(ledger: Ledger, _sender: str, _args: Answer, deadline: Deadline) -> Answer:
    return {"weights": ledger.weights(deadline)}


def _register(ledger: Ledger, sender: str, _args: Answer, deadline: Deadline) -> Answer:
    return wire.receipt_to_dict(ledger.register(sender, deadline))


def _publish(ledger: Ledger, sender: str, args: Answer, deadline: Deadline) -> Answer:
    ip, port = wire.typed(args, "ip", str), wire.typed(args, "port", int)
    return wire.receipt_to_dict(ledger.publish(sender, ip, port, deadline))


def _submit(ledger: Ledger, sender: str, args: Answer, deadline: Deadline) -> Answer:
    pairs = wire.typed(args, "weights", list)
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise LedgerError(Code.INVALID_WEIGHTS, "weights must be pairs of hotkey and number")
    weights = parse_weights([(pair[0], pair[1]) for pair in pairs])
    version_key = wire.typed(args, "version_key", int)
    return wire.receipt_to_dict(ledger.submit_weights(sender, weights, version_key, deadline))


_CALLS: dict[str, Callable[[Ledger, str, Answer, Deadline], Answer]] = {
    "snapshot": _snapshot,
    "clock": _clock,
    "block_hash": _block_hash,
    "weights": _weights,
    "register": _register,
    "publish": _publish,
    "submit_weights": _submit,
}


async def _read_body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > wire.REQUEST_LIMIT:
            raise ValueError(f"the body exceeds {wire.REQUEST_LIMIT} bytes")
        parts.append(part)
    return b"".join(parts)


def _json(status: int, value: Answer) -> Response:
    return Response(wire.dumps(value), status_code=status, media_type="application/json")
