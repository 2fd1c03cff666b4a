"""HTTP requests of a FastAPI program, counted and timed.

Surprising fact: a request is named by its route's template, never by its path, so that nobody outside can make series.
"""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Histogram

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)


def request_histogram(program: str, registry: CollectorRegistry) -> Histogram:
    """``hivetrain_PROGRAM_request_seconds`` by ``route`` and ``status`` (``2xx`` and so on)."""
    return Histogram(
        f"hivetrain_{program}_request_seconds",
        "HTTP requests: number and duration; a stream lasts as long as its client.",
        ["route", "status"],
        buckets=SECONDS,
        registry=registry,
    )


class CountedRequests:
    """ASGI middleware: ``app.add_middleware(CountedRequests, histogram=request_histogram(...))``.

    Args:
        app: the application inside.
        histogram: with the labels ``route`` and ``status``.
    """

    def __init__(self, app: Any, histogram: Histogram) -> None:
        self._app, self._histogram = app, histogram

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on and note how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._histogram.labels(route, f"{status // 100}xx").observe(time.perf_counter() - began)
