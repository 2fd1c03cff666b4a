"""One direction of a link: a socket that only ever sends, or only ever receives.

A link has two, because an OpenSSL connection must not be read and written by two threads at once.
"""

import contextlib
import socket
import time
from collections.abc import Callable

from hivetrain.averaging.codecs import Data
from hivetrain.averaging.direct.bucket import CHUNK_BYTES, TokenBucket
from hivetrain.averaging.direct.stream import Stream

_KEEPALIVE_S = 30
_MAX_NAP_S = 0.1


class Pipe:
    """A connected, authenticated stream.

    Args:
        stream: plain or TLS.
        timeout_s: longest time to send a frame; None to receive: who waits for something has a limit of its own.
        bucket: limit on what is sent.
    """

    def __init__(self, stream: Stream, timeout_s: float | None, bucket: TokenBucket | None) -> None:
        self._stream, self._bucket = stream, bucket
        self.heard_at = time.monotonic()
        self._busy_since: float | None = None
        self.bytes_sent = 0
        self.sending_s = 0.0
        sock = stream.sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(AttributeError, OSError):  # by its own name on each system
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
        sock.settimeout(timeout_s)

    @property
    def busy_s(self) -> float:
        """Seconds that the frame being sent has taken so far."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def send(self, head: bytes, data: Data, is_closed: Callable[[], bool]) -> None:
        """Sends a frame. Raises OSError when it cannot, TimeoutError when it takes too long."""
        started = self._busy_since = time.monotonic()
        if self._bucket is not None:
            self._send_slowly(memoryview(head + bytes(data)), self._bucket, is_closed)
        else:
            self._stream.send(head, data)
        self._busy_since = None
        self.sending_s += time.monotonic() - started
        self.bytes_sent += len(head) + len(data)

    def _send_slowly(self, frame: memoryview, bucket: TokenBucket, is_closed: Callable[[], bool]) -> None:
        for start in range(0, len(frame), CHUNK_BYTES):
            piece = frame[start : start + CHUNK_BYTES]
            until = time.monotonic() + bucket.reserve(len(piece))
            while (left_s := until - time.monotonic()) > 0:
                if is_closed():
                    raise OSError("closed")
                time.sleep(min(_MAX_NAP_S, left_s))
            self._stream.send(b"", piece)

    def take_counts(self) -> tuple[int, float]:
        """Bytes sent since the last call, and the seconds that sending them took."""
        counts, self.bytes_sent, self.sending_s = (self.bytes_sent, self.sending_s), 0, 0.0
        return counts

    def receive(self, room: memoryview) -> None:
        """Fills ``room``. Raises OSError when the connection breaks, EOFError when it was closed."""
        while room:
            count = self._stream.receive_some(room)
            if not count:
                raise EOFError("the connection was closed")
            self.heard_at = time.monotonic()
            room = room[count:]

    def close(self) -> None:
        """Wakes whoever waits in it; to be called once, from any thread."""
        self._stream.wake()

    def release(self) -> None:
        """Gives the socket back; nobody may be waiting in it."""
        self._stream.close()
