"""Finished files of a manifest that is being built, so that an interruption costs one file.

The surprising fact: a last line cut short by a kill is expected and dropped; anything else that does not parse is an
error.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO

from hivetrain.data.errors import ManifestError
from hivetrain.data.manifest import ManifestFile


class Journal:
    """One JSON line for what is being built, then one for each finished file.

    Args:
        path: The file; None keeps nothing.
        header: What is being built. A journal of something else is refused.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: list[object]) -> None:
        self.path = Path(path) if path is not None else None
        self.header = header
        self._done: dict[str, ManifestFile] = {}
        self._out: IO[str] | None = None

    def __enter__(self) -> "Journal":
        if self.path is None:
            return self
        known = self._load(self.path) if self.path.exists() else 0
        self._out = self.path.open("a", encoding="utf-8")
        self._out.truncate(known)
        if not known:
            self._write(self.header)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    def get(self, key: str) -> ManifestFile | None:
        """A file finished earlier."""
        return self._done.get(key)

    def add(self, key: str, file: ManifestFile) -> None:
        """Note a file as finished."""
        self._done[key] = file
        self._write([key, asdict(file)])

    def finish(self) -> None:
        """Everything is done: remove the journal."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, value: object) -> None:
        if self._out is not None:
            self._out.write(json.dumps(value) + "\n")
            self._out.flush()

    def _load(self, path: Path) -> int:
        """Read what is done; returns the length up to the last newline, for what follows it was cut short."""
        content = path.read_bytes()
        length = content.rfind(b"\n") + 1
        lines = content[:length].decode("utf-8").splitlines()
        try:
            if lines and json.loads(lines[0]) != self.header:
                raise ManifestError(f"{path} is of another manifest ({lines[0]}). Delete it, or choose another --out.")
            for line in lines[1:]:
                key, file = json.loads(line)
                self._done[key] = ManifestFile(**{**file, "rows": tuple(file["rows"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ManifestError(f"{path} is damaged ({error}). Delete it to start again.") from error
        return length
