"""A direct link to one peer: two connections, one for each direction, and a thread for each.

Links outlive rounds. What a thread needs to know about the round under way is in the sessions that the round attaches;
frames of a round that is over are read and thrown away.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from hivemind.p2p import PeerID

from hivetrain.averaging.codecs import Data
from hivetrain.averaging.direct.frames import HEADER_BYTES, Header, Kind
from hivetrain.averaging.direct.pipe import Pipe
from hivetrain.averaging.direct.session import Session
from hivetrain.averaging.reduction import ExchangeError

logger = logging.getLogger(__name__)

_MAX_CONTROL = 64
_MAX_BUSY_S = 0.5

OnControl = Callable[["Link", Header, bytes], None]


class Link:
    """Two authenticated pipes to a peer.

    Args:
        peer_id: who is at the other end.
        outgoing, incoming: its pipes; closed with the link.
        on_control: called on the receiving thread with USE, BALLOT and ANSWER frames.
        on_close: called once, on any thread.
    """

    def __init__(
        self, peer_id: PeerID, outgoing: Pipe, incoming: Pipe, on_control: OnControl,
        on_close: Callable[["Link"], None],
    ) -> None:  # fmt: skip
        self.peer_id, self.outgoing, self.incoming = peer_id, outgoing, incoming
        self._on_control, self._on_close = on_control, on_close
        self._wake = threading.Condition()
        self._control: deque[tuple[Header, bytes]] = deque()
        self._group: bytes | None = None
        self._sessions: dict[int, Session] = {}
        self.is_closed = self.is_released = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"hivetrain-link-{name}", daemon=True)
            for name, work in (("out", self._send_all), ("in", self._receive_all))
        ]

    def start(self) -> None:
        """Begins to read; nothing is read before."""
        for thread in self._threads:
            thread.start()

    def enter(self, group: bytes) -> None:
        """A round begins; to be called before the other end is told."""
        with self._wake:
            self._group, self._sessions = group, {}
            self._wake.notify_all()

    def leave(self, group: bytes) -> None:
        """A round is over. Closes the link if it hangs in a frame of that round."""
        with self._wake:
            is_done = all(session.is_done for session in self._sessions.values())
            if self._group == group:
                self._group, self._sessions = None, {}
            self._wake.notify_all()
        if not is_done and self.outgoing.busy_s > _MAX_BUSY_S:
            self.close("hangs")

    def attach(self, stage: int, session: Session) -> None:
        """A stage of the round begins."""
        session.reduction.listen(self._notify)
        with self._wake:
            self._sessions[stage] = session
            self._wake.notify_all()
        if self.is_closed:
            session.fail(ExchangeError(f"member {session.member} is gone", [session.member]))

    def say(self, kind: Kind, group: bytes, payload: bytes = b"") -> None:
        """Sends a control frame, ahead of parts that wait."""
        with self._wake:
            if len(self._control) < _MAX_CONTROL:
                self._control.append((Header(kind, group, len(payload)), payload))
            self._wake.notify_all()

    def close(self, why: str | ExchangeError = "closed") -> None:
        """Ends the link, and with an error what is under way on it; its threads end by themselves."""
        with self._wake:
            if self.is_closed:
                return
            self.is_closed = True
            sessions = list(self._sessions.values())
            self._wake.notify_all()
        for session in sessions:  # first: the other end, cut off, will say that it is our fault
            if not session.is_done:
                fault = ExchangeError(f"member {session.member}: {why}", [session.member])
                session.fail(why if isinstance(why, ExchangeError) else fault)
        self.outgoing.close()
        self.incoming.close()
        self._on_close(self)

    def join(self, timeout_s: float) -> None:
        """Waits for the end of the threads of a closed link."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s)
        if not any(thread.is_alive() for thread in self._threads):
            self.outgoing.release()
            self.incoming.release()
            self.is_released = True

    def _guarded(self, work: Callable[[], None]) -> None:
        why: str | ExchangeError = "closed"
        try:
            work()
        except TimeoutError:
            why = "took nothing of what was sent to it"
        except (OSError, EOFError) as error:
            why = f"is gone: {error}"
        except ExchangeError as error:
            why = error
        except ValueError as error:
            why = str(error)
        except Exception:  # a thread's end is a process boundary of a kind: the link closes, the program goes on
            logger.exception("a link's thread failed")
            why = ExchangeError("this peer's link failed: see its log")
        self.close(why)

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify_all()

    def _send_all(self) -> None:
        while (frame := self._next()) is not None:
            header, payload, session = frame
            self.outgoing.send(header.to_bytes(), payload(), lambda: self.is_closed)
            if session is not None:
                session.sent(header)

    def _next(self) -> tuple[Header, Callable[[], Data], Session | None] | None:
        with self._wake:
            while not self.is_closed:
                if self._control:
                    header, payload = self._control.popleft()
                    return header, partial(bytes, payload), None
                for session in self._sessions.values():
                    if (frame := session.next_frame()) is not None:
                        return *frame, session
                self._wake.wait()
        return None

    def _receive_all(self) -> None:
        head = memoryview(bytearray(HEADER_BYTES))
        while not self.is_closed:
            self.incoming.receive(head)
            header = Header.from_bytes(head)
            if header.kind in (Kind.PART, Kind.AVERAGE):
                session = self._session_of(header)
                if session is None or session.reduction.error is not None:
                    self._skip(header.length)
                else:
                    session.received(header, self.incoming.receive)
                continue
            payload = bytearray(header.length)
            self.incoming.receive(memoryview(payload))
            self._on_control(self, header, bytes(payload))

    def _session_of(self, header: Header) -> Session | None:
        """The session that a part belongs to, waiting for its stage to begin; None: its round is over.

        A round that this end is not in cannot lie ahead: parts come when both ends have said that they use the link.
        """
        with self._wake:
            self._wake.wait_for(lambda: self.is_closed or header.group != self._group or header.stage in self._sessions)
            return self._sessions.get(header.stage) if header.group == self._group else None

    def _skip(self, length: int) -> None:
        room = memoryview(bytearray(min(length, 2**16)))
        while length:
            piece = room[: min(length, len(room))]
            self.incoming.receive(piece)
            length -= len(piece)
