"""The dashboard's HTTP side: one page, its files, the picture as JSON, and changes as server-sent events.

Surprising fact: every answer forbids the browser to load anything from elsewhere, so text that a hostile peer put into
the DHT could do nothing even if the page forgot to treat it as text.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hivetrain.metrics import CountedRequests, DashboardMetrics
from hivetrain.monitor.feed import Feed
from hivetrain.monitor.history import History

STATIC = Path(__file__).parent / "static"
MAX_STREAMS = 64
MAX_POINTS = 4000
LISTED = 100  # epochs and events with which a page begins
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_HEARTBEAT_S = 10.0
_POLL_S = 0.25


def create_app(feed: Feed, history: History, closing: threading.Event, metrics: DashboardMetrics) -> FastAPI:
    """The application.

    ``GET /api/state`` answers the whole picture with the latest epochs and events; ``GET /api/series?points=N`` the
    columns of the charts, downsampled to N rows; ``GET /api/stream?since=FEED-VERSION`` what changes from there on;
    ``GET /health`` whether the run can be read.

    Args:
        feed: the picture.
        history: the past.
        closing: set when the program ends: streams end with it.
        metrics: told of each request.
    """
    app = FastAPI(title="hivetrain dashboard", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_SafeHeaders)
    app.add_middleware(CountedRequests, histogram=metrics.requests)
    streams: set[object] = set()

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/api/state")
    def state() -> JSONResponse:
        lists = {
            "epochs": [asdict(line) for line in history.last_epochs(LISTED)],
            "events": [asdict(event) for event in history.last_events(LISTED)],
        }
        return JSONResponse({**feed.whole(), "lists": lists})

    @app.get("/api/series")
    def series(points: int = Query(800, ge=10, le=MAX_POINTS)) -> JSONResponse:
        return JSONResponse({"epochs": history.epoch_series(points), "ticks": history.tick_series(points)})

    @app.get("/health")
    def health() -> JSONResponse:
        run = feed.whole()["parts"].get("run", {"error": "nothing has been read yet"})
        if run["error"]:
            return JSONResponse({"status": "unavailable", "reason": run["error"]}, status_code=503)
        return JSONResponse({"status": "ok", "version": feed.version})

    @app.get("/api/stream")
    async def stream(since: str = Query("", max_length=64)) -> Response:
        if len(streams) >= MAX_STREAMS:
            return JSONResponse({"reason": f"{MAX_STREAMS} pages are open already"}, status_code=503)
        token = object()
        streams.add(token)

        async def told() -> AsyncIterator[str]:
            try:
                with metrics.viewer():
                    async for event in _events(feed, since, closing):
                        yield event
            finally:
                streams.discard(token)

        return StreamingResponse(told(), media_type="text/event-stream")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


async def _events(feed: Feed, since: str, closing: threading.Event) -> AsyncIterator[str]:
    """Everything that changes from a version on; ``reset`` where that version is of another time."""
    changed, loop = asyncio.Event(), asyncio.get_running_loop()
    stop = feed.listen(partial(_wake, loop, changed))
    name, _, number = since.rpartition("-")
    version = int(number) if number.isascii() and number.isdigit() and len(number) < 16 else -1
    silent_s = 0.0
    try:
        yield "retry: 2000\n\n"
        while not closing.is_set():
            update = feed.since(version) if name == feed.name else None
            if update is None:
                yield _event("reset", "", {})
                return
            if update["version"] > version:
                version, silent_s = update["version"], 0.0
                yield _event("update", f"{feed.name}-{version}", update)
            try:
                await asyncio.wait_for(changed.wait(), _POLL_S)
                changed.clear()
            except TimeoutError:
                silent_s += _POLL_S
            if silent_s >= _HEARTBEAT_S:
                silent_s = 0.0
                yield ": still here\n\n"
    finally:
        stop()


def _wake(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(changed.set)


def _event(kind: str, identity: str, data: dict[str, Any]) -> str:
    head = f"id: {identity}\n" if identity else ""
    return f"event: {kind}\n{head}data: {json.dumps(data, allow_nan=False, separators=(',', ':'))}\n\n"


class _SafeHeaders:
    """Adds the headers to every answer; as plain ASGI, because a stream must not be held back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self._app(scope, receive, send_with_headers)
