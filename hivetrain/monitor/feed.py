"""The latest picture with a version, so that whoever has seen one gets only what changed since.

Surprising fact: nothing is queued for anybody. A reader that comes back asks for what is newer than its version, and
one that was away for too long is told to begin anew; so a slow reader costs no memory.
"""

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

_KEPT = 512  # changes of lists that a reader may have missed

Listener = Callable[[], None]


class Feed:
    """Tables and lists for many readers; safe on any thread."""

    def __init__(self) -> None:
        self.name = secrets.token_hex(6)  # of this start: versions of another one mean nothing
        self._lock = threading.Lock()
        self._version = 0
        self._parts: dict[str, tuple[int, Any]] = {}
        self._rows: dict[str, tuple[int, dict[str, Any]]] = {}
        self._gone: deque[tuple[int, str]] = deque(maxlen=_KEPT)
        self._lists: dict[str, deque[tuple[int, Any]]] = {}
        self._oldest = 0  # versions from here on can be brought up to date
        self._listeners: set[Listener] = set()

    @property
    def version(self) -> int:
        """Number of the latest change."""
        return self._version

    def publish(
        self, parts: dict[str, Any], rows: Iterable[dict[str, Any]], additions: dict[str, list[dict[str, Any]]]
    ) -> None:
        """Sets the picture.

        Args:
            parts: whole tables by name; one that is as before is not sent again.
            rows: all rows of the miners' table, by their ``key``.
            additions: by name of a list, what comes to it.
        """
        with self._lock:
            version = self._version + 1
            changed = self._put_parts(version, parts) + self._put_rows(version, rows)
            for name, entries in additions.items():
                for entry in entries:
                    changed += 1
                    self._append(self._lists.setdefault(name, deque(maxlen=_KEPT)), (version, entry))
            if not changed:
                return
            self._version = version
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def since(self, version: int) -> dict[str, Any] | None:
        """What changed after ``version``; None if that cannot be told any more."""
        with self._lock:
            if not self._oldest <= version <= self._version:
                return None
            lists = {name: [entry for at, entry in entries if at > version] for name, entries in self._lists.items()}
            return {
                "version": self._version,
                "parts": {name: part for name, (at, part) in self._parts.items() if at > version},
                "miners": [row for at, row in self._rows.values() if at > version],
                "gone": [key for at, key in self._gone if at > version and key not in self._rows],
                "lists": {name: entries for name, entries in lists.items() if entries},
            }

    def whole(self) -> dict[str, Any]:
        """The picture without the lists."""
        with self._lock:
            return {
                "feed": self.name,
                "version": self._version,
                "parts": {name: part for name, (_, part) in self._parts.items()},
                "miners": [row for _, row in self._rows.values()],
            }

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls ``listener`` after each change, on the thread that made it; returns how to stop that."""
        with self._lock:
            self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    def _put_parts(self, version: int, parts: dict[str, Any]) -> int:
        changed = {name: part for name, part in parts.items() if self._parts.get(name, (0, None))[1] != part}
        self._parts.update({name: (version, part) for name, part in changed.items()})
        return len(changed)

    def _put_rows(self, version: int, rows: Iterable[dict[str, Any]]) -> int:
        changed, keys = 0, set()
        for row in rows:
            keys.add(row["key"])
            before = self._rows.get(row["key"])
            if before is None or before[1] != row:
                self._rows[row["key"]] = (version, row)
                changed += 1
        for key in [key for key in self._rows if key not in keys]:
            del self._rows[key]
            self._append(self._gone, (version, key))
            changed += 1
        return changed

    def _append(self, entries: deque[tuple[int, Any]], entry: tuple[int, Any]) -> None:
        if len(entries) == entries.maxlen:
            self._oldest = max(self._oldest, entries[0][0])
        entries.append(entry)
