"""Follows a run in the background: reads the DHT and the chain, keeps the history, publishes the picture.

Surprising fact: a chain that hangs delays nothing else, because it is read in a thread of its own; what it said last
stays on the page with the reason why there is nothing newer. A history that cannot be written (the disk is full) hides
nothing of the present, and gets later what it lacks.
"""

import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, replace

from prometheus_client import CollectorRegistry

from hivetrain.averaging.loop import Interrupted
from hivetrain.averaging.settings import RunSettings
from hivetrain.chain.base import Chain, LedgerError
from hivetrain.contribution.scoreboard import Scoreboard
from hivetrain.metrics import DashboardMetrics
from hivetrain.monitor.aggregate import EpochLine
from hivetrain.monitor.feed import Feed
from hivetrain.monitor.history import KEPT_NOTES, MAX_EVENTS, History, Tick
from hivetrain.monitor.reader import RunReader
from hivetrain.monitor.roster import Event, Member, Roster
from hivetrain.monitor.status import EpochNote, RoundNote, Status
from hivetrain.monitor.tables import ChainView, chain_table, miner_rows, swarm_table, validator_rows, weight_matrix

logger = logging.getLogger(__name__)

_TICK_S = 10.0
_KEEP_S = 60.0
_BOARDS_S = 10.0
_DAY_S = 24 * 3600.0
_CHAIN_TIMEOUT_S = 10.0


class Collector:
    """Reads one run again and again until it is stopped.

    Args:
        reader: of the run, open.
        history: open.
        feed: where the picture goes.
        chain: the chain that pays the run and its address; None without one. Closed by :meth:`stop`.
        interval_s: seconds between two readings.
        peers_known: other nodes that our DHT node knows; without any, an empty reading says nothing of the run.
        clock: seconds since 1970.
        metrics: told of each look; None: nobody asks.
    """

    def __init__(
        self,
        reader: RunReader,
        history: History,
        feed: Feed,
        chain: tuple[Chain, str] | None = None,
        interval_s: float = 2.0,
        peers_known: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.time,
        metrics: DashboardMetrics | None = None,
    ) -> None:
        self._metrics = metrics or DashboardMetrics(CollectorRegistry())
        self._reader, self._history, self._feed = reader, history, feed
        self._interval_s, self._peers_known, self._clock = interval_s, peers_known, clock
        self._chain = chain[0] if chain else None
        self._chain_view = ChainView(chain[1]) if chain else None
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._repeat, args=(self.step, interval_s), name="collector")]
        if chain:
            self._threads.append(threading.Thread(target=self._repeat, args=(self.read_chain, 0.0), name="chain"))
        self._roster = Roster()
        self._settings: RunSettings | None = None
        self._fingerprint = b""
        self._boards: dict[str, Scoreboard] = {}
        self._signed: dict[str, str] = {}  # hotkey -> peer id
        self._told: dict[str, Status] = {}
        self._signed_epoch = -1
        self._ticked_at = self._kept_at = self._boards_at = self._pruned_at = float("-inf")
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)  # not in the history yet
        self._ticks: deque[Tick] = deque(maxlen=MAX_EVENTS)
        self._error = ""
        self._error_since = 0.0

    def start(self) -> None:
        """Takes up what the history knows and begins to read."""
        self._roster = Roster(self._history.members())
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def stop(self, timeout_s: float = 3.0) -> None:
        """Ends both threads and keeps the peers for the next start; may be called twice."""
        self._stopped.set()
        if self._chain is not None:
            self._chain.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout_s)
        if not any(thread.is_alive() for thread in self._threads):
            self._kept_at = float("-inf")
            try:
                self._write(self._clock())
            except sqlite3.Error as error:
                logger.warning("the history cannot be written: %s", error)

    def step(self) -> None:
        """Reads once, and publishes what came of it."""
        now = self._clock()
        events: list[Event] = []
        lines: list[EpochLine] = []
        ticks: list[Tick] = []
        faults: list[str] = []
        try:
            with self._metrics.reading("dht"):
                reading = self._reader.read()
                if not reading.alive and not self._peers_known():
                    raise TimeoutError("our DHT node knows no other node any more: restart the dashboard")
            events = self._roster.update(reading)
            ticks = self._tick(now, events)
            self._learn()
        except TimeoutError as error:
            faults.append(str(error) or "the DHT does not answer")
        try:
            lines = self._write(now)
        except sqlite3.Error as error:
            faults.append(f"the history cannot be written: {error}")
        self._say("; ".join(faults), now)
        self._publish(events, lines, ticks)

    def read_chain(self) -> None:
        """Reads the chain once and waits for its next block."""
        assert self._chain is not None
        assert self._chain_view is not None
        try:
            with self._metrics.reading("chain"):
                view = self._chain.snapshot(_CHAIN_TIMEOUT_S)
                weights = self._chain.weights(_CHAIN_TIMEOUT_S)
        except LedgerError as error:
            self._chain_view = replace(self._chain_view, error=str(error))
            self._stopped.wait(5.0)
            return
        self._chain_view = replace(self._chain_view, snapshot=view, weights=weights, error="", read_at=self._clock())
        block_time_s = view.rules.block_time_s or 2.0
        self._stopped.wait(min(max(block_time_s / 2, 1.0), 12.0))

    def _repeat(self, work: Callable[[], None], pause_s: float) -> None:
        while not self._stopped.is_set():
            try:
                work()
            except Interrupted:
                return
            except Exception:  # the thread's boundary
                if self._stopped.is_set():
                    return
                logger.exception("reading the run failed; the dashboard goes on")
                self._stopped.wait(2.0)
            self._stopped.wait(pause_s)

    def _learn(self) -> None:
        """Reads what changes seldom: the run's settings, who works for which hotkey, the validators' scores."""
        view = self._roster.view()
        fingerprint = view.peers[0].fingerprint if view.peers else b""
        if fingerprint and (fingerprint != self._fingerprint or self._settings is None):
            self._fingerprint, self._settings = fingerprint, self._reader.settings(fingerprint)
        if self._chain_view is None:
            return
        if view.epoch > self._signed_epoch + 1:
            statuses = (member.status for member in self._roster.members)
            named = {status.hotkey for status in statuses if status is not None and status.hotkey is not None}
            signed = self._signed | self._reader.peers_of(named, view.epoch - 1)
            self._signed = {hotkey: peer for hotkey, peer in signed.items() if hotkey in named}
            self._signed_epoch = view.epoch - 1
        if self._clock() - self._boards_at >= _BOARDS_S and self._chain_view.snapshot is not None:
            self._boards_at = self._clock()
            self._boards = self._reader.scoreboards(self._chain_view.is_validator)

    def _note(self, now: float) -> list[EpochLine]:
        """Takes over what peers with the run's settings say of its last epochs and have not said before."""
        view = self._roster.view()
        peers = {peer.peer_id for peer in view.peers}
        notes: list[tuple[str, EpochNote]] = []
        rounds: list[tuple[str, RoundNote]] = []
        heldout = []
        told: dict[str, Status] = {}
        for member in self._roster.live:
            status, peer = member.status, member.peer_id
            if status is None or peer not in peers:
                continue
            told[peer] = status
            before = self._told.get(peer)
            if before == status:
                continue
            old = {*before.epochs, *before.rounds} if before else set()
            notes += [(peer, note) for note in status.epochs if note not in old and _is_near(note.epoch, view.epoch)]
            rounds += [(peer, note) for note in status.rounds if note not in old and _is_near(note.epoch, view.epoch)]
            measured = status.heldout_loss
            if measured is not None and math.isfinite(measured) and status.heldout_epoch <= view.epoch:
                heldout.append((peer, status.heldout_epoch, measured))
        lines = self._history.add_notes(now, notes, rounds, heldout) if notes or rounds or heldout else []
        self._told = told
        return lines

    def _tick(self, now: float, events: list[Event]) -> list[Tick]:
        """What the history lacks after a reading; returns the moment if it is one of those that are kept."""
        self._events += events
        if events:
            self._kept_at = float("-inf")
        joined = sum(event.kind in ("joined", "returned") for event in events)
        gone = sum(event.kind in ("left", "lost") for event in events)
        if now - self._ticked_at < _TICK_S and not joined and not gone:
            return []
        live = self._roster.live
        speed = sum(member.status.tokens_per_s for member in live if member.status is not None)
        tick = Tick(now, len(live), speed, joined, gone)
        self._ticks.append(tick)
        self._ticked_at = now
        return [tick]

    def _write(self, now: float) -> list[EpochLine]:
        """Gives the history what it lacks; returns the epochs' lines that changed. What fails is tried again."""
        if self._events:
            self._history.add_events(self._events)
            self._events.clear()
        while self._ticks:
            self._history.add_tick(self._ticks[0])
            self._ticks.popleft()
        if now - self._pruned_at > _DAY_S / 4:
            self._history.prune_ticks(now - _DAY_S, 300.0)
            self._pruned_at = now
        if now - self._kept_at >= _KEEP_S:
            self._history.keep_members(self._roster.members)
            self._kept_at = now
        self._metrics.stored(self._history.size_bytes)
        return self._note(now)

    def _publish(self, events: list[Event], lines: list[EpochLine], ticks: list[Tick]) -> None:
        members: list[Member] = self._roster.members
        view, chain = self._roster.view(), self._chain_view
        self._metrics.saw(view.epoch, len(view.peers))
        if chain is not None:
            chain = replace(chain, boards=self._boards)
        parts = {
            "run": {
                "run_id": self._reader.run_id,
                "interval_s": self._interval_s,
                "error": self._error,
                "error_since": self._error_since if self._error else None,
                "refused": self._roster.refused,
                "left_out": self._roster.left_out,
            },
            "swarm": swarm_table(view, self._roster.live, self._settings),
            "chain": chain_table(chain),
            "validators": validator_rows(chain),
            "matrix": weight_matrix(chain),
        }
        additions = {
            "events": [asdict(event) for event in events],
            "epochs": [asdict(line) for line in lines],
            "ticks": [asdict(tick) for tick in ticks],
        }
        self._feed.publish(parts, miner_rows(members, view, chain, self._signed), additions)

    def _say(self, fault: str, now: float) -> None:
        if fault and not self._error:
            self._error_since = now
            logger.warning("the dashboard is not up to date: %s", fault)
        self._error = fault


def _is_near(epoch: int, current: int) -> bool:
    """Whether an epoch is one that peers may tell of; no liar gets far into the past or the future."""
    return current - KEPT_NOTES < epoch <= current + 1
