"""The HTTP server of ``/metrics``, and the registry that it reads.

Surprising fact: what a program exposes is computed when somebody asks for it, on the server's threads, so that training
pays nothing for metrics that nobody reads.
"""

import logging
import os
import platform
import socket
import threading
from importlib.metadata import version
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Info, ProcessCollector, start_http_server

from hivetrain.errors import UserError

logger = logging.getLogger(__name__)

CLOSE_S = 2.0
REQUEST_S = 10.0


def new_registry(program: str) -> CollectorRegistry:
    """A registry of its own for a program, with the process's usual metrics and the build's versions."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Info("hivetrain_build", "What runs here.", registry=registry)
    build.info({"program": program, "version": version("hivetrain"), "python": platform.python_version()})
    return registry


class MetricsServer:
    """Serves a registry until closed; use it as a context manager, or call ``start`` and ``close``.

    Args:
        port: where to listen; 0 picks a free port.
        host: the interface; loopback unless said otherwise, for there is no authentication.
        registry: what to serve.
    """

    def __init__(self, port: int, host: str, registry: CollectorRegistry) -> None:
        self._port, self._host, self._registry = port, host, registry
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port listened on, once started."""
        return self._server.server_port if self._server is not None else self._port

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    def check(self) -> None:
        """Find out now whether the port can be had, without keeping it.

        Raises:
            UserError: it is taken, or the host is not an address of this machine.
        """
        try:
            family = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((self._host, self._port), family=family).close()
        except (OSError, OverflowError) as error:
            raise self._refusal(error) from error

    def start(self) -> "MetricsServer":
        """Listen and answer on threads of their own.

        Raises:
            UserError: the port is taken, or the host is not an address of this machine.
        """
        try:
            server, thread = start_http_server(self._port, self._host, self._registry)
        except (OSError, OverflowError) as error:
            raise self._refusal(error) from error
        # A client that says nothing gives its thread back after a while.
        handler: Any = server.RequestHandlerClass
        server.RequestHandlerClass = type("Handler", (handler,), {"timeout": REQUEST_S})
        self._server, self._thread = server, thread
        logger.info("metrics are at %s", self.url)
        return self

    def close(self) -> None:
        """Stop; takes about half a second and may be called twice."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        server.shutdown()
        thread.join(CLOSE_S)
        server.server_close()

    def __enter__(self) -> "MetricsServer":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refusal(self, error: Exception) -> UserError:
        code: Any = getattr(error, "errno", None) or 0
        reason = os.strerror(code) if code > 0 else error
        return UserError(
            f"cannot serve metrics on {self._host} port {self._port}: {reason}; choose another port or host for them"
        )
