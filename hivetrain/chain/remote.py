"""RemoteChain: a ledger that another host serves.

Surprising fact: the requests are signed, the answers are not. Against somebody on the path between, put TLS in front of
the server and give an https URL.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hivetrain.chain import wire
from hivetrain.chain.base import Chain, Code, Deadline, LedgerError, Outcome, Receipt, Snapshot, Weights
from hivetrain.chain.calls import LoopThread
from hivetrain.chain.weights import check_endpoint, parse_weights
from hivetrain.keys import Hotkey, Wallet, is_address, sign_request

if TYPE_CHECKING:
    import aiohttp

POLL_S = 0.05
CLOCK_S = 0.4


@dataclass
class _Progress:
    sent: bool = False  # the server may have seen the request
    answered: bool = False


class RemoteChain(Chain):
    """A served ledger as seen by one hotkey.

    Args:
        url: of the server, such as ``http://10.0.0.5:9944``.
        hotkey: who acts: a key, or a wallet whose hotkey is read at the first call.
        server_hotkey: the server's address; None asks the server once and trusts the answer from then on.
        now_ns: nanoseconds since 1970, for the nonces.
    """

    def __init__(
        self,
        url: str,
        hotkey: Hotkey | Wallet,
        server_hotkey: str | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._url = url.rstrip("/")
        self._who = hotkey
        self._server_hotkey = server_hotkey
        self._now_ns = now_ns
        self._loop = LoopThread("remote-chain")
        self._closed = threading.Event()
        self._session: aiohttp.ClientSession | None = None
        self._session_loop: asyncio.AbstractEventLoop | None = None

    @property
    def hotkey(self) -> str:
        return self._key().address

    def snapshot(self, timeout_s: float) -> Snapshot:
        return _parsed(wire.snapshot_from_dict, self._ask("snapshot", {}, timeout_s))

    def register(self, timeout_s: float) -> Receipt:
        return self._write("register", {}, timeout_s)

    def publish(self, ip: str, port: int, timeout_s: float) -> Receipt:
        ip = check_endpoint(ip, port, allow_loopback=True)  # whether loopback will do is for the ledger to say
        return self._write("publish", {"ip": ip, "port": port}, timeout_s)

    def submit_weights(self, weights: Weights, version_key: int, timeout_s: float) -> Receipt:
        pairs = [[hotkey, weight] for hotkey, weight in parse_weights(weights).items()]
        return self._write("submit_weights", {"weights": pairs, "version_key": version_key}, timeout_s)

    def wait_block(self, block: int, timeout_s: float) -> int:
        deadline = Deadline(timeout_s, time.monotonic)
        while True:
            # Reading the clock gets a little time of its own, so that a short wait still learns the current block.
            current, next_s = _parsed(_clock, self._ask("clock", {}, deadline.left_s() + CLOCK_S))
            if current >= block or deadline.left_s() <= 0:
                return int(current)
            if self._closed.wait(min(deadline.left_s(), max(POLL_S, next_s or 0.0))):
                raise LedgerError(Code.CLOSED, "this chain was closed")

    def block_hash(self, block: int, timeout_s: float) -> str | None:
        found: str | None = _parsed(_hash, self._ask("block_hash", {"block": block}, timeout_s))
        return found

    def weights(self, timeout_s: float) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = _parsed(_matrix, self._ask("weights", {}, timeout_s))
        return found

    def close(self) -> None:
        self._closed.set()
        self._loop.close(self._close_session)

    def _key(self) -> Hotkey:
        if isinstance(self._who, Wallet):
            self._who = self._who.load()
        return self._who

    def _write(self, call: str, args: Mapping[str, Any], timeout_s: float) -> Receipt:
        progress = _Progress()
        try:
            return _parsed(wire.receipt_from_dict, self._ask(call, args, timeout_s, progress))
        except LedgerError as error:
            if progress.sent and not progress.answered and error.code == Code.UNREACHABLE:
                return Receipt(Outcome.UNKNOWN, detail=error.message)
            raise

    def _ask(
        self, call: str, args: Mapping[str, Any], timeout_s: float, progress: "_Progress | None" = None
    ) -> dict[str, Any]:
        deadline = Deadline(timeout_s, time.monotonic)
        path, body = f"/v1/{call}", wire.dumps(args)
        try:
            if self._server_hotkey is None:
                found = self._loop.call(lambda: self._exchange("GET", "/v1/hotkey", b"", {}, _Progress()), timeout_s)
                self._server_hotkey = str(_parsed(_address, found))
            headers = sign_request(
                self._key(),
                method="POST",
                path=path,
                body=body,
                receiver=self._server_hotkey,
                nonce_ns=self._now_ns(),
            )
            return self._loop.call(
                lambda: self._exchange("POST", path, body, headers, progress or _Progress()),
                deadline.check("asking the ledger for its hotkey"),
            )
        except TimeoutError:
            raise LedgerError(Code.UNREACHABLE, f"{self._url} did not answer within {timeout_s:g} s") from None

    async def _exchange(
        self, method: str, path: str, body: bytes, headers: dict[str, str], progress: "_Progress"
    ) -> dict[str, Any]:
        import aiohttp

        try:
            async with self._open_session().request(
                method, self._url + path, data=body, headers=headers, allow_redirects=False, trace_request_ctx=progress
            ) as response:
                data, status = await _read_body(response.content), response.status
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise LedgerError(Code.UNREACHABLE, f"{self._url} is not reachable: {reason}") from None
        progress.answered = True
        return _checked(status, data, self._url)

    def _open_session(self) -> "aiohttp.ClientSession":
        import aiohttp

        loop = asyncio.get_running_loop()
        if self._session is None or self._session_loop is not loop:
            self._loop.keep_for_parent(self._session)
            trace = aiohttp.TraceConfig()
            trace.on_request_headers_sent.append(_mark_sent)
            timeout = aiohttp.ClientTimeout(total=None)  # the deadline of each call is set around it
            self._session = aiohttp.ClientSession(timeout=timeout, trace_configs=[trace], trust_env=False)
            self._session_loop = loop
        return self._session

    async def _close_session(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _mark_sent(_session: Any, context: SimpleNamespace, _params: Any) -> None:
    context.trace_request_ctx.sent = True


async def _read_body(content: Any) -> bytes:
    parts, size = [], 0
    async for part in content.iter_chunked(1 << 16):
        size += len(part)
        if size > wire.RESPONSE_LIMIT:
            raise LedgerError(Code.INCOMPATIBLE, f"the answer exceeds {wire.RESPONSE_LIMIT} bytes")
        parts.append(part)
    return b"".join(parts)


def _checked(status: int, data: bytes, url: str) -> dict[str, Any]:
    answer = _parsed(wire.loads, data)
    if status == 200:
        return answer
    if isinstance(answer.get("error"), dict):
        raise _parsed(wire.error_from_dict, answer["error"])
    reason = str(answer.get("refused", "no reason given"))[:200]
    code = Code.UNREACHABLE if status in (401, 408, 429, 503) else Code.INCOMPATIBLE
    raise LedgerError(code, f"{url} refused the request ({status}): {reason}")


def _parsed(parse: Callable[[Any], Any], data: Any) -> Any:
    try:
        return parse(data)
    except ValueError as error:
        raise LedgerError(Code.INCOMPATIBLE, f"the server does not speak this protocol: {error}") from None


def _address(data: dict[str, Any]) -> str:
    if not is_address(data.get("hotkey")):
        raise ValueError("its hotkey is no address")
    return str(data["hotkey"])


def _clock(data: dict[str, Any]) -> tuple[int, float | None]:
    next_s = data.get("next_s")
    return wire.typed(data, "block", int), None if next_s is None else wire.typed(data, "next_s", float)


def _hash(data: dict[str, Any]) -> str | None:
    found: str | None = wire.typed(data, "hash", str | None)
    return found


def _matrix(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    rows = wire.typed(data, "weights", dict)
    return {
        validator: {miner: wire.typed(row, miner, float) for miner in row}
        for validator, row in rows.items()
        if isinstance(row, dict)
    }
