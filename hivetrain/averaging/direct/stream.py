"""What bytes go through, plain or TLS: one interface over a connected socket.

The surprising fact: Python's ``SSLSocket`` makes three system calls for every record of 16 KB. TLS in memory takes many
records from the socket at once and gives it many at once, and so needs fewer.
"""

import contextlib
import socket
import ssl
import time

from hivetrain.averaging.codecs import Data

_READ_BYTES = 2**16
_WRITE_BYTES = 2**17
_WAIT_ALL_BYTES = 2**18


class Stream:
    """A connected socket.

    Args:
        sock: with the timeout that each operation is to have.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, head: bytes, data: Data = b"") -> None:
        """Sends everything. Raises OSError when it cannot, TimeoutError when one step takes too long."""
        sent = self.sock.sendmsg([head, data])
        if sent < len(head):
            self.sock.sendall(head[sent:])
            sent = len(head)
        if sent < len(head) + len(data):
            self.sock.sendall(memoryview(data)[sent - len(head) :])

    def receive_some(self, room: memoryview) -> int:
        """Puts bytes into ``room`` and returns their number; 0: the connection was closed."""
        return self.sock.recv_into(room, min(len(room), _WAIT_ALL_BYTES), socket.MSG_WAITALL)  # fewer turns

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes, within the socket's timeout in all.

        Raises:
            OSError: the connection broke, was closed, or took longer.
        """
        timeout_s = self.sock.gettimeout()
        assert timeout_s is not None, "a handshake has a deadline"
        deadline, data = time.monotonic() + timeout_s, bytearray(size)
        room = memoryview(data)
        try:
            while room:
                self.sock.settimeout(max(0.01, deadline - time.monotonic()))
                count = self.receive_some(room)
                if not count:
                    raise ConnectionResetError("the connection was closed")
                room = room[count:]
        finally:
            self.sock.settimeout(timeout_s)
        return bytes(data)

    def wake(self) -> None:
        """Ends what any thread waits for in it; to be called from any thread."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the socket back; nobody may be waiting in it."""
        self.sock.close()


class TLSStream(Stream):
    """TLS over a connected socket; :meth:`greet` comes first.

    Args:
        sock: as above.
        context: with the certificate, on the server's side.
        server_side: whether the other end has dialled.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        super().__init__(sock)
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._leaving, server_side=server_side)
        self._room = memoryview(bytearray(_READ_BYTES))

    def greet(self) -> bytes:
        """Does the handshake, within the socket's timeout in all; returns the other end's certificate, or nothing.

        Raises:
            OSError: the other end speaks no TLS, the connection broke, or took longer.
        """
        timeout_s = self.sock.gettimeout()
        assert timeout_s is not None, "a handshake has a deadline"
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                self.sock.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    self._tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    if not self._take():
                        raise ConnectionResetError("closed in the handshake") from None
                finally:
                    self._flush()  # an alert too
        finally:
            self.sock.settimeout(timeout_s)
        return self._tls.getpeercert(binary_form=True) or b""

    def send(self, head: bytes, data: Data = b"") -> None:
        self._tls.write(head)
        view = memoryview(data)
        for start in range(0, len(view), _WRITE_BYTES):
            self._tls.write(view[start : start + _WRITE_BYTES])
            self._flush()
        self._flush()

    def receive_some(self, room: memoryview) -> int:
        read, filled, size = self._tls.read, 0, len(room)
        while True:
            try:
                while filled < size:
                    count: int = read(size - filled, room[filled:])  # type: ignore[assignment]  # with a buffer
                    if not count:
                        return filled
                    filled += count
                return filled
            except ssl.SSLWantReadError:
                if filled or not self._take():
                    return filled

    def _take(self) -> int:
        count = self.sock.recv_into(self._room)
        self._arrived.write(self._room[:count])
        return count

    def _flush(self) -> None:
        if self._leaving.pending:
            self.sock.sendall(self._leaving.read())
