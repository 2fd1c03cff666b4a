"""Links that strangers have opened, and halves of links, until a round names them as members or their time is up.

Each peer has few places, and the oldest goes when there is no more room: nobody can keep the others out.
"""

import contextlib
import socket
import time
from collections.abc import Iterable

from hivemind.p2p import PeerID

from hivetrain.averaging.direct.handshake import Direction, Hello
from hivetrain.averaging.direct.stream import Stream

UNCLAIMED_S = 15.0
_MAX = 64
_MAX_HALVES = 4  # of one peer, which opens one link at a time


class Unclaimed:
    """Pairs the connections of a link, and keeps them."""

    def __init__(self) -> None:
        self._halves: dict[tuple[PeerID, bytes], tuple[Hello, Stream, float]] = {}
        self._links: dict[PeerID, tuple[list[Stream], float]] = {}

    def add(self, peer_id: PeerID, hello: Hello, stream: Stream) -> None:
        """A connection that a peer has opened. A new link replaces an older one of the same peer."""
        now = time.monotonic()
        other, half, _ = self._halves.pop((peer_id, hello.link), (None, None, now))
        if other is None or half is None:
            self._halves[peer_id, hello.link] = hello, stream, now
        elif other.direction is hello.direction:
            close_all([half, stream])
        else:
            close_all(self.take(peer_id))
            self._links[peer_id] = [half, stream] if hello.direction is Direction.SENDING else [stream, half], now
        own = [key for key in self._halves if key[0] == peer_id]
        for key in own[:-_MAX_HALVES]:
            self._halves.pop(key)[1].close()
        while len(self._halves) > _MAX:
            self._halves.pop(next(iter(self._halves)))[1].close()
        while len(self._links) > _MAX:
            close_all(self.take(next(iter(self._links))))

    def take(self, peer_id: PeerID) -> list[Stream]:
        """The connections of the link that a peer has opened, to send on and to receive from, if there is one."""
        return self._links.pop(peer_id, ([], 0.0))[0]

    def close_older_than(self, seconds: float) -> None:
        """Closes what has waited for longer."""
        oldest = time.monotonic() - seconds
        for key in [key for key, (_, _, since) in self._halves.items() if since <= oldest]:
            self._halves.pop(key)[1].close()
        for peer_id in [peer_id for peer_id, (_, since) in self._links.items() if since <= oldest]:
            close_all(self.take(peer_id))


def close_all(sockets: Iterable[socket.socket | Stream]) -> None:
    """Closes sockets of any kind."""
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.close()
