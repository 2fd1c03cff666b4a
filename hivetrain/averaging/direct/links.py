"""All direct links of this peer: listens, dials, and keeps what has been opened from one round to the next.

A stranger gets as far as a handshake. Its link is kept for a moment without a byte being read, and closed unless a
round names the stranger as a member.
"""

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from hivemind.p2p import PeerID

from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.direct.handshake import Credentials, Direction, HandshakeError, Hello
from hivetrain.averaging.direct.link import Link, OnControl
from hivetrain.averaging.direct.pipe import Pipe
from hivetrain.averaging.direct.stream import Stream
from hivetrain.averaging.direct.unclaimed import UNCLAIMED_S, Unclaimed, close_all

logger = logging.getLogger(__name__)

DIAL_S = 2.0
_SWEEP_S = 5.0
_MAX_LINKS = 3  # to one member at a time: a dead one that was kept, and one that each end has dialled
_HANDSHAKES = 8
_DIALS = 128  # two for each link
_BACKLOG = 64
_JOIN_S = 1.0


class DirectLinks:
    """Opens, accepts and keeps links. Create it inside a running event loop.

    Args:
        credentials: of this peer.
        run_id: name of the run; dialling another run's peer is refused.
        send_timeout_s: longest time to send a frame.
        on_control: see :class:`Link`.
        bucket: limit on the upload.
    """

    def __init__(
        self, credentials: Credentials, run_id: str, send_timeout_s: float, on_control: OnControl,
        bucket: TokenBucket | None,
    ) -> None:  # fmt: skip
        self._credentials, self._run = credentials, hashlib.sha256(run_id.encode()).digest()
        self._send_timeout_s, self._on_control, self._bucket = send_timeout_s, on_control, bucket
        self._loop = asyncio.get_running_loop()
        self._links: dict[PeerID, list[Link]] = {}
        self._closed: list[Link] = []
        self._unclaimed = Unclaimed()
        self._expected: dict[PeerID, list[asyncio.Event]] = {}
        self._workers = ThreadPoolExecutor(_HANDSHAKES, "hivetrain-handshake")
        self._diallers = ThreadPoolExecutor(_DIALS, "hivetrain-dial")  # its own: strangers must not take its places
        self._servers: list[socket.socket] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_swept = False
        self._handshaking: set[socket.socket] = set()
        self.port = 0

    def listen(self, hosts: Sequence[str], port: int) -> None:
        """Begins to accept on all ``hosts``, on one port.

        Raises:
            OSError: the port is taken.
        """
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            server = socket.create_server((host, self.port or port), family=family, backlog=_BACKLOG)
            server.setblocking(False)
            self.port = server.getsockname()[1]
            self._servers.append(server)
            self._tasks.append(asyncio.create_task(self._accept_all(server)))
        self._begin_to_sweep()

    def find(self, peer_id: PeerID) -> Link | None:
        """A link that is open to a member of the own group; begins to read from one that had been waiting."""
        if not self._open_links(peer_id):
            self._claim(peer_id)
        return next(iter(self._open_links(peer_id)), None)

    @contextlib.contextmanager
    def expecting(self, peer_id: PeerID) -> Iterator[asyncio.Event]:
        """For as long, every link that a member opens is read at once; the event is set when a link is open."""
        opened = asyncio.Event()
        self._expected.setdefault(peer_id, []).append(opened)
        try:
            self._claim(peer_id)
            if self._open_links(peer_id):
                opened.set()
            yield opened
        finally:
            self._expected[peer_id].remove(opened)
            if not self._expected[peer_id]:
                del self._expected[peer_id]

    def keep(self, link: Link) -> None:
        """Both ends use this link; closes the others to that member."""
        for other in self._open_links(link.peer_id):
            if other is not link:
                other.close("uses another link")
        close_all(self._unclaimed.take(link.peer_id))

    async def dial(self, peer_id: PeerID, addresses: Sequence[tuple[str, int]], timeout_s: float) -> Link | None:
        """Opens a link to a member; returns None if none of its addresses leads to it within ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        for number, address in enumerate(addresses):
            now = time.monotonic()
            until = now + (deadline - now) / (len(addresses) - number)
            streams = await self._dial_both(peer_id, address, until)
            if streams is not None:
                return self._open(peer_id, *streams)
        return None

    async def _dial_both(self, peer_id: PeerID, address: tuple[str, int], until: float) -> list[Stream] | None:
        """Both connections of a link at once: they take half the round trips."""
        name, streams = os.urandom(16), None
        work = [
            self._diallers.submit(self._dial_once, peer_id, address, Hello(direction, name, self._run), until)
            for direction in Direction
        ]
        try:
            async with asyncio.timeout(until - time.monotonic()):  # a place among the diallers too takes time
                streams = await asyncio.gather(*map(asyncio.wrap_future, work))
        except (OSError, HandshakeError) as error:
            logger.debug("no link to %s at %s: %s", peer_id, address, error)
        finally:
            if streams is None:
                for each in work:
                    each.cancel()
                    each.add_done_callback(_close_unwanted)
        return streams

    async def stop(self) -> None:
        """Closes all links and waits for their threads."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        close_all(self._servers)
        close_all(self._handshaking)
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._diallers.shutdown(wait=False, cancel_futures=True)
        self._unclaimed.close_older_than(0.0)
        links = [*itertools.chain(*self._links.values()), *self._closed]
        for link in links:
            link.close()
        await asyncio.gather(*(asyncio.to_thread(link.join, _JOIN_S) for link in links))

    def _dial_once(self, peer_id: PeerID, address: tuple[str, int], hello: Hello, until: float) -> Stream:
        sock = socket.create_connection(address, timeout=max(0.01, until - time.monotonic()))
        try:
            sock.settimeout(max(0.01, until - time.monotonic()))
            return self._credentials.dial(sock, peer_id, hello)
        except BaseException:
            sock.close()
            raise

    def _open(self, peer_id: PeerID, sending: Stream, receiving: Stream) -> Link:
        outgoing = Pipe(sending, self._send_timeout_s, self._bucket)
        link = Link(peer_id, outgoing, Pipe(receiving, None, None), self._on_control, self._forget)
        self._links.setdefault(peer_id, []).append(link)
        link.start()
        self._begin_to_sweep()
        for opened in self._expected.get(peer_id, ()):
            opened.set()
        return link

    def _open_links(self, peer_id: PeerID) -> list[Link]:
        return [link for link in self._links.get(peer_id, ()) if not link.is_closed]

    def _claim(self, peer_id: PeerID) -> None:
        """Begins to read from a link that has been waiting, unless the other end has closed it since."""
        if not (streams := self._unclaimed.take(peer_id)):
            return
        if len(self._open_links(peer_id)) >= _MAX_LINKS or any(map(_has_ended, streams)):
            close_all(streams)
        else:
            self._open(peer_id, *streams)

    def _forget(self, link: Link) -> None:
        def forget() -> None:
            links = self._links[link.peer_id]
            links.remove(link)
            if not links:
                del self._links[link.peer_id]
            self._closed.append(link)

        with contextlib.suppress(RuntimeError):  # the loop has ended
            if asyncio._get_running_loop() is self._loop:
                forget()
            else:
                self._loop.call_soon_threadsafe(forget)

    async def _accept_all(self, server: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(server)
            except OSError as error:
                logger.warning("cannot accept a direct link: %s", error)
                await asyncio.sleep(0.1)
                continue
            if len(self._handshaking) >= _BACKLOG:
                sock.close()
                continue
            self._handshaking.add(sock)
            asyncio.ensure_future(self._greet(sock)).add_done_callback(lambda task: task.cancelled() or task.result())

    async def _greet(self, sock: socket.socket) -> None:
        try:
            until = time.monotonic() + DIAL_S
            secured, peer_id, hello = await self._loop.run_in_executor(self._workers, self._accept_once, sock, until)
        except (OSError, HandshakeError, RuntimeError) as error:
            logger.debug("refused a direct link: %s", error)
            sock.close()
            return
        finally:
            self._handshaking.discard(sock)
        self._unclaimed.add(peer_id, hello, secured)
        if peer_id in self._expected:
            self._claim(peer_id)

    def _accept_once(self, sock: socket.socket, until: float) -> tuple[Stream, PeerID, Hello]:
        sock.settimeout(max(0.01, until - time.monotonic()))  # less, after a wait for a worker
        return self._credentials.accept(sock, self._run)

    def _begin_to_sweep(self) -> None:
        if not self._is_swept:
            self._is_swept = True
            self._tasks.append(asyncio.create_task(self._sweep()))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._unclaimed.close_older_than(UNCLAIMED_S)
            for link in self._closed:
                link.join(0)
            self._closed = [link for link in self._closed if not link.is_released]


def _has_ended(stream: Stream) -> bool:
    """Whether the other end has closed a connection that nobody reads from yet."""
    timeout_s = stream.sock.gettimeout()
    stream.sock.setblocking(False)
    try:
        return not stream.sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        stream.sock.settimeout(timeout_s)


def _close_unwanted(work: "Future[Stream]") -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().close()
