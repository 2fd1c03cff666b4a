"""Reads a run's records off the DHT, knowing nothing but its run_id.

Surprising fact: no settings are needed to see a run's peers. Every record names the settings by their hash, and the
peers publish them under that hash, so what most peers have is found here and cannot be forged.
"""

import asyncio
import json
import time
from collections.abc import Callable, Container, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hivetrain.averaging.loop import NetworkLoop
from hivetrain.averaging.progress import MAX_RECORDS, MAX_TTL_S, Progress
from hivetrain.averaging.settings import MAX_SETTINGS_BYTES, RunSettings, find_settings
from hivetrain.contribution.fields import RecordError
from hivetrain.contribution.record import hotkey_subkey, open_contribution, work_key
from hivetrain.contribution.scoreboard import Scoreboard, open_scoreboard, scores_key
from hivetrain.monitor.status import Status, status_key

T = TypeVar("T")
_OWNED, _OWNED_END = b"[owner:", b"]"  # hivemind lets nobody else write under such a subkey


@dataclass(frozen=True)
class Sighting:
    """A peer's progress record as read.

    Attributes:
        progress: what it says.
        expires: DHT time until which the peer counts as alive.
    """

    progress: Progress
    expires: float


@dataclass
class Reading:
    """The peers' records at one moment, by the subkey that only their peer can write.

    Attributes:
        at: when the reading began, seconds since 1970.
        alive: progress records.
        left: peers that took their record back.
        statuses: status records.
        refused: records that are none.
    """

    at: float
    alive: dict[bytes, Sighting] = field(default_factory=dict)
    left: set[bytes] = field(default_factory=set)
    statuses: dict[bytes, Status] = field(default_factory=dict)
    refused: int = 0


class RunReader:
    """Looks at one run.

    Args:
        dht: a running DHT node that somebody else opened and will close.
        run_id: name of the run.
        timeout_s: limit for a single question to the DHT.
        clock: seconds since 1970, which is also DHT time.
        give_up: asked several times a second during every wait.
    """

    def __init__(
        self,
        dht: Any,
        run_id: str,
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.time,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._dht, self.run_id, self._timeout_s, self._clock, self._give_up = dht, run_id, timeout_s, clock, give_up
        self._loop = NetworkLoop(f"hivetrain-reader-{run_id}")

    def open(self) -> None:
        """Starts to read."""
        self._loop.start()

    def close(self) -> None:
        """Stops; takes some seconds at most."""
        self._loop.stop()

    def read(self) -> Reading:
        """Progress and status of all peers.

        Raises:
            TimeoutError: the DHT does not answer.
        """
        at = self._clock()
        progress, statuses = self._call(self._both())
        return parse_reading(progress, statuses, at)

    def settings(self, fingerprint: bytes) -> RunSettings | None:
        """The settings that a fingerprint names; None if nobody tells them. Raises TimeoutError."""
        value = self._call(self._get(f"{self.run_id}_settings_{fingerprint.hex()}"))
        entries = value.values() if isinstance(value, dict) else ()
        told = find_settings((getattr(entry, "value", None) for entry in entries), fingerprint)
        return parse_settings(told, fingerprint)

    def scoreboards(self, is_validator: Callable[[str], bool]) -> dict[str, Scoreboard]:
        """The latest scores of the validators that count, by their hotkey. Raises TimeoutError."""
        boards: dict[str, Scoreboard] = {}
        page, more = 0, True
        while more:
            # Only validators' entries, before any is left out as one too many or a signature is checked.
            entries = self._call(self._entries(scores_key(self.run_id, page), lambda key: is_validator(_address(key))))
            more = False
            for subkey, (value, _) in entries.items():
                try:
                    found, pages = open_scoreboard(value, self.run_id, page)
                except RecordError:
                    continue
                if found.hotkey == _address(subkey):
                    merge_page(boards, found, page)
                    more = more or page + 1 < pages
            page += 1
        return boards

    def peers_of(self, hotkeys: Container[str], swarm_epoch: int) -> dict[str, str]:
        """For which peer each of these hotkeys has signed work of an epoch: hotkey -> peer id. Raises TimeoutError."""
        key = work_key(self.run_id, swarm_epoch)
        entries = self._call(self._entries(key, lambda subkey: _address(subkey) in hotkeys))
        return parse_work(entries, self.run_id, swarm_epoch)

    async def _both(self) -> tuple[dict[bytes, tuple[bytes, float]], dict[bytes, tuple[bytes, float]]]:
        keys = (f"{self.run_id}_progress", status_key(self.run_id))
        progress, statuses = await asyncio.gather(*map(self._entries, keys))
        return progress, statuses

    async def _entries(
        self, key: str, counts: Callable[[bytes], bool] = lambda _: True
    ) -> dict[bytes, tuple[bytes, float]]:
        value = await self._get(key)
        items = value.items() if isinstance(value, dict) else ()
        found: dict[bytes, tuple[bytes, float]] = {}
        for subkey, entry in [item for item in items if isinstance(item[0], bytes) and counts(item[0])][:MAX_RECORDS]:
            content, expires = getattr(entry, "value", None), getattr(entry, "expiration_time", None)
            if isinstance(content, bytes) and isinstance(expires, float):
                found[subkey] = (content, expires)
        return found

    async def _get(self, key: str) -> Any:
        found = await asyncio.wait_for(self._dht.get(key, latest=True, return_future=True), self._timeout_s)
        return getattr(found, "value", None)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.call(work, self._timeout_s + 1, self._give_up)


def parse_reading(
    progress: dict[bytes, tuple[bytes, float]], statuses: dict[bytes, tuple[bytes, float]], at: float
) -> Reading:
    """What untrusted records say; a pure function."""
    reading = Reading(at)
    for subkey, (value, expires) in progress.items():
        if value == b"":
            reading.left.add(subkey)
            continue
        try:
            record = Progress.from_bytes(value)
        except ValueError:
            reading.refused += 1
            continue
        plausible = at - 1 < expires <= at + MAX_TTL_S and 0 < len(record.peer_id) <= 128
        if not plausible or not _is_owned(subkey):
            reading.refused += 1
            continue
        reading.alive[subkey] = Sighting(record, expires)
    for subkey, (value, _) in statuses.items():
        try:
            status = Status.from_bytes(value)
        except RecordError:
            reading.refused += 1
            continue
        if _is_owned(subkey):
            reading.statuses[subkey] = status
    return reading


def parse_settings(data: Any, fingerprint: bytes) -> RunSettings | None:
    """The settings in these untrusted bytes if they are those that the fingerprint names."""
    if not isinstance(data, bytes) or len(data) > MAX_SETTINGS_BYTES:
        return None
    try:
        settings = RunSettings(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    numbers, texts = (settings.num_params, settings.target_batch_size), (settings.compression, settings.optimizer)
    if any(type(number) is not int or not 0 < number < 2**53 for number in numbers):
        return None
    if any(not isinstance(text, str) or len(text) > 64 for text in texts):
        return None
    return settings if settings.fingerprint == fingerprint else None


def parse_work(entries: Mapping[bytes, tuple[bytes, float]], run_id: str, swarm_epoch: int) -> dict[str, str]:
    """What untrusted contributions under the epoch's key say: hotkey -> the peer for which it signed."""
    found: dict[str, str] = {}
    for subkey, (value, _) in entries.items():
        try:
            work = open_contribution(value)
        except RecordError:
            continue
        if (work.run_id, work.swarm_epoch, hotkey_subkey(work.hotkey)) == (run_id, swarm_epoch, subkey):
            found[work.hotkey] = work.peer_id
    return found


def merge_page(boards: dict[str, Scoreboard], found: Scoreboard, page: int) -> None:
    """Adds a page to the validator's board; a page of another tempo than the first one is left out."""
    first = boards.get(found.hotkey)
    if page == 0:
        boards[found.hotkey] = found
    elif first is not None and first.block == found.block:
        boards[found.hotkey] = Scoreboard(first.run_id, first.hotkey, first.block, first.miners + found.miners)


def _address(subkey: bytes) -> str:
    """The hotkey whose subkey this is; "" if it is none's."""
    mark = hotkey_subkey("")
    return subkey.removeprefix(mark).decode(errors="replace") if subkey.startswith(mark) else ""


def _is_owned(subkey: bytes) -> bool:
    return subkey.startswith(_OWNED) and subkey.endswith(_OWNED_END)
