"""The manifest: which files a corpus consists of and how they are cut into units.

Its digest names the data. The surprising fact: the units held out for validation are simply the last ones of the last
files, so that one number in the manifest keeps every miner from training on them.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from hivetrain.data.errors import ManifestError

MAX_MANIFEST_BYTES = 1 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KINDS = {"repository": str, "revision": str, "content_key": str, "heldout_units": int, "files": list, "digest": str}


@dataclass(frozen=True)
class ManifestFile:
    """One file of a corpus.

    Args:
        path: Path relative to the folder or repository.
        size_bytes: Its size.
        sha256: Hash of its bytes.
        rows: Documents in each of its units; a parquet file has one unit per row group.
    """

    path: str
    size_bytes: int
    sha256: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class CorpusManifest:
    """The public description of a corpus.

    Args:
        repository: Name of the data set on the hub, or any name for local data.
        revision: The commit that pins a hub data set; empty for local data, which its hashes pin.
        files: The files in the order that numbers the units.
        content_key: The column that holds the text.
        heldout_units: How many units at the end are never assigned to a miner.
    """

    repository: str
    revision: str
    files: tuple[ManifestFile, ...]
    content_key: str = "content"
    heldout_units: int = 0

    def __post_init__(self) -> None:
        if self.revision and not _COMMIT.fullmatch(self.revision):
            raise ManifestError(
                f"revision {self.revision!r} of {self.repository} is not pinned: a branch or tag can move. "
                "Give the 40 hexadecimal digits of a commit."
            )
        for file in self.files:
            if PurePosixPath(file.path).is_absolute() or ".." in PurePosixPath(file.path).parts:
                raise ManifestError(f"{file.path}: paths must stay inside the data set")
            if not _SHA256.fullmatch(file.sha256):
                raise ManifestError(f"{file.path}: sha256 must be 64 hexadecimal digits, not {file.sha256!r}")
            if file.size_bytes < 0 or any(rows < 1 for rows in file.rows):
                raise ManifestError(f"{file.path}: sizes and row counts must be positive")
        if not 0 <= self.heldout_units < max(self.n_units, 1):
            raise ManifestError(
                f"heldout_units is {self.heldout_units}, but {self.repository} has {self.n_units} units: "
                "at least one must be left to train on."
            )

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(file.rows) for file in self.files))

    @property
    def n_units(self) -> int:
        """All units, held-out ones included."""
        return self._ends[-1] if self._ends else 0

    @property
    def n_train_units(self) -> int:
        """Units that may be assigned to miners: the indices from 0 up to this number."""
        return self.n_units - self.heldout_units

    def locate(self, unit: int) -> tuple[int, int]:
        """Index of the file that holds a unit, and the unit's number (row group) within that file."""
        if not 0 <= unit < self.n_units:
            raise ManifestError(f"unit {unit} does not exist: {self.repository} has {self.n_units} units")
        index = bisect_right(self._ends, unit)
        return index, unit - (self._ends[index] - len(self.files[index].rows))

    @cached_property
    def digest(self) -> str:
        """sha256 over the canonical JSON of everything in the manifest."""
        return hashlib.sha256(_canonical(asdict(self))).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest and its digest as JSON, atomically."""
        path = Path(path)
        body = asdict(self)
        files = ",\n".join("  " + _canonical(file).decode() for file in body.pop("files"))
        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in {**body, "digest": self.digest}.items())
        partial = path.with_name(path.name + ".partial")
        partial.write_text("{\n" + head + ' "files": [\n' + files + "\n ]\n}\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CorpusManifest":
        """Read a manifest that ``save`` wrote.

        Raises:
            ManifestError: It is missing, malformed, or its digest does not match its content.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
            body = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ManifestError(f"{path}: not a readable manifest ({error})") from error
        return cls.from_dict(body, source=str(path))

    @classmethod
    def from_dict(cls, body: object, source: str = "manifest") -> "CorpusManifest":
        """Check and build a manifest from parsed JSON."""
        try:
            fields = _typed(
                body, repository=str, revision=str, content_key=str, heldout_units=int, files=list, digest=str
            )
            digest = fields.pop("digest")
            files = [_typed(file, path=str, size_bytes=int, sha256=str, rows=list) for file in fields.pop("files")]
            for file in files:
                file["rows"] = tuple(_typed({"rows": rows}, rows=int)["rows"] for rows in file["rows"])
            manifest = cls(files=tuple(ManifestFile(**file) for file in files), **fields)
        except (TypeError, KeyError) as error:
            raise ManifestError(f"{source}: not a manifest ({error})") from error
        if manifest.digest != digest:
            raise ManifestError(f"{source}: says digest {digest}, but its content has {manifest.digest}: rebuild it")
        return manifest


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _typed(body: object, **kinds: type) -> dict[str, Any]:
    if not isinstance(body, Mapping):
        raise TypeError("expected a JSON object")
    if unknown := set(body) - set(kinds):
        raise TypeError(f"unknown key {sorted(unknown)[0]!r}")
    for key, kind in kinds.items():
        if type(body[key]) is not kind:
            raise TypeError(f"{key} must be {kind.__name__}")
    return dict(body)
