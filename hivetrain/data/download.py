"""Byte ranges over HTTP, with a deadline that holds: what is read from a hub comes through here.

The surprising fact: the identity of a file is checked with every answer. Its size, and the commit and hash that the hub
puts into its headers, must be those of the manifest, else the read fails for good.
"""

import io
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import requests
import urllib3

from hivetrain.data.errors import DataError

logger = logging.getLogger(__name__)

_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
_HINTS = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "ask for access on the data set's page",
    404: "check repository, revision and path",
    416: "the file is shorter than the manifest says: rebuild the manifest",
}


class DownloadError(DataError):
    """A range could not be read. ``url`` and ``reason`` say what and why."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: {reason}")
        self.url = url
        self.reason = reason


@dataclass(frozen=True)
class RemoteFile:
    """A file as the manifest describes it; empty ``sha256`` or ``commit`` are not compared."""

    url: str
    size_bytes: int
    sha256: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Retry:
    """When to give up and how long to wait.

    Args:
        deadline_s: For everything that one unit needs, waits included.
        read_timeout_s: Longest silence of a connection.
        first_wait_s: Wait before the first retry; doubles with each, and is shortened by up to half at random.
        longest_wait_s: Longest wait, unless the server asks for a longer one by Retry-After.
    """

    deadline_s: float = 300.0
    read_timeout_s: float = 20.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0


class _TransientError(Exception):
    """Worth another try; ``wait_s`` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass
class Downloader:
    """Reads ranges, tries again where that can help, and logs each new try.

    Args:
        retry: When to give up.
        headers: Sent with each request, for instance an access token.
        before_request: Called before each request; a pacer may wait here.
        sleep: Waits for so many seconds.
        clock: Monotonic seconds.
        jitter: Random numbers in [0, 1).
    """

    retry: Retry = field(default_factory=Retry)
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    before_request: Callable[[], None] | None = None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = random.random
    _session: requests.Session | None = field(default=None, repr=False)
    _pid: int = 0

    def deadline(self) -> float:
        """The moment, on ``clock``, at which a read that starts now must have ended."""
        return self.clock() + self.retry.deadline_s

    def read(self, file: RemoteFile, start: int, stop: int, deadline: float, purpose: str) -> bytes:
        """Bytes ``start`` up to ``stop`` of a file.

        Args:
            file: What to read, and what it must be.
            start: First byte.
            stop: One past the last byte.
            deadline: From ``deadline()``.
            purpose: Named in the log, such as ``unit 17``.

        Raises:
            DownloadError: The file is not the one described, the server refuses, or the deadline has passed.
        """
        tries = 0
        while True:
            try:
                return self._try(file, start, stop, deadline)
            except _TransientError as error:
                tries += 1
                wait_s = min(self.retry.first_wait_s * 2 ** (tries - 1), self.retry.longest_wait_s)
                wait_s = max(wait_s * (1 - self.jitter() / 2), error.wait_s or 0.0)
                left_s = deadline - self.clock()
                if wait_s >= left_s:
                    asked = f"; the server asks to wait {error.wait_s:.0f} s" if error.wait_s else ""
                    raise DownloadError(
                        file.url, f"gave up after {tries} tries in {self.retry.deadline_s:.0f} s: {error}{asked}"
                    ) from error
                logger.warning("%s: %s: %s; try %d in %.1f s", purpose, file.url, error, tries + 1, wait_s)
                self.sleep(wait_s)

    def _try(self, file: RemoteFile, start: int, stop: int, deadline: float) -> bytes:
        if self.before_request is not None:
            self.before_request()
        timeout = max(min(self.retry.read_timeout_s, deadline - self.clock()), 0.001)
        headers = {**self.headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            with self._open_session().get(file.url, headers=headers, timeout=timeout, stream=True) as response:
                _check_status(response, file.url)
                _check_identity(response, file, start, stop)
                return self._body(response, stop - start, deadline)
        except requests.exceptions.SSLError as error:
            raise DownloadError(file.url, f"no secure connection: {error}") from error
        except (requests.Timeout, urllib3.exceptions.ReadTimeoutError) as error:
            raise _TransientError(f"no answer for {timeout:.1f} s") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _TransientError(f"connection failed ({type(error).__name__})") from error

    def _body(self, response: requests.Response, length: int, deadline: float) -> bytes:
        body = bytearray()
        while len(body) < length:
            # One read of the socket at a time: a server that drips bytes must not outlast the deadline.
            chunk = response.raw.read1(min(1 << 16, length - len(body)))
            if not chunk:
                raise _TransientError(f"body ends after {len(body)} of {length} bytes")
            body += chunk
            if self.clock() > deadline:
                raise _TransientError(f"only {len(body)} of {length} bytes arrived in time")
        return bytes(body)

    def _open_session(self) -> requests.Session:
        if self._session is None or self._pid != os.getpid():
            # Sockets must not be shared across a fork.
            self._session, self._pid = requests.Session(), os.getpid()
        return self._session

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_session": None, "_pid": 0}


class RangeFile(io.RawIOBase):
    """A remote file to be read like a local one; every read is one request.

    Args:
        downloader: Reads the ranges.
        file: What to read.
        deadline: For all reads together, from ``downloader.deadline()``.
        purpose: Named in the log.
    """

    def __init__(self, downloader: Downloader, file: RemoteFile, deadline: float, purpose: str) -> None:
        super().__init__()
        self._downloader = downloader
        self._file = file
        self._deadline = deadline
        self._purpose = purpose
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def size(self) -> int:
        return self._file.size_bytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size_bytes}[whence]
        self._place = base + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        stop = self._file.size_bytes if size is None or size < 0 else min(self._place + size, self._file.size_bytes)
        if stop <= self._place:
            return b""
        content = self._downloader.read(self._file, self._place, stop, self._deadline, self._purpose)
        self._place = stop
        return content


def _check_status(response: requests.Response, url: str) -> None:
    status = response.status_code
    if status in _TRANSIENT_STATUS:
        raise _TransientError(f"HTTP {status}", _retry_after_s(response.headers.get("Retry-After")))
    if status not in (200, 206):
        hint = f": {_HINTS[status]}" if status in _HINTS else ""
        raise DownloadError(url, f"HTTP {status}{hint}")


def _check_identity(response: requests.Response, file: RemoteFile, start: int, stop: int) -> None:
    if response.status_code == 200:
        if (start, stop) != (0, file.size_bytes):
            raise DownloadError(file.url, "the server cannot send parts of a file (it ignores Range)")
        total = response.headers.get("Content-Length", "")
    else:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    facts = [("size", total, str(file.size_bytes))]
    for answer in (*response.history, response):
        linked_etag = answer.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
        facts.append(("sha256", linked_etag if len(linked_etag) == 64 else "", file.sha256))
        facts.append(("commit", answer.headers.get("X-Repo-Commit", ""), file.commit))
    for name, theirs, ours in facts:
        if theirs and ours and theirs != ours:
            raise DownloadError(file.url, f"not the file in the manifest: its {name} is {theirs}, not {ours}")


def _retry_after_s(value: str | None) -> float | None:
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max((moment - datetime.now(moment.tzinfo or UTC)).total_seconds(), 0.0) if moment.tzinfo else None
