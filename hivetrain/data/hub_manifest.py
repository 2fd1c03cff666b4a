"""The manifest of a data set on the hub: ``datasets`` resolves its names, footers give its row groups.

The surprising fact: no data is downloaded. Sizes and hashes come from the hub's listing, and of a parquet file only the
last kilobytes are read. Only files that are not parquet must be fetched whole, to count their rows.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hivetrain.data.download import Downloader, DownloadError, RangeFile, RemoteFile
from hivetrain.data.errors import ManifestError
from hivetrain.data.folder import content_column, parquet_rows
from hivetrain.data.journal import Journal
from hivetrain.data.manifest import CorpusManifest, ManifestFile, file_sha256

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 << 20
PATHS_PER_REQUEST = 500


def manifest_of_hub(
    repository: str,
    revision: str,
    *,
    download_dir: Path,
    config: str | None = None,
    split: str = "train",
    content_key: str = "content",
    heldout_units: int = 0,
    rows_per_unit: int = 500,
    requests_per_minute: int = 300,
    max_files: int | None = None,
    journal_path: Path | None = None,
    on_file: Callable[[int, int], None] | None = None,
) -> CorpusManifest:
    """List the files of a split and measure their units.

    Args:
        repository: ``owner/name``.
        revision: The commit.
        download_dir: Where files that are not parquet are kept.
        config: The configuration; needed where the data set has several.
        split: The split.
        content_key: The column that holds the text.
        heldout_units: Units at the end that are kept for validation.
        rows_per_unit: Documents per unit where the data set has no parquet files.
        requests_per_minute: Pace; anonymous users of the hub may make 3,000 requests in five minutes.
        max_files: Refuse a split of more files.
        journal_path: Finished files are written here, so that a second call goes on where the first was cut off.
        on_file: Called with (files done, files in all).

    Raises:
        ManifestError: The data set cannot be resolved, or a file of it cannot be used.
    """
    from hivetrain.data.hub import access_headers, check_pinned

    check_pinned(repository, revision)
    listed = _list_files(repository, revision, config, split)
    if max_files is not None and len(listed) > max_files:
        raise ManifestError(
            f"{repository} has {len(listed)} files. Build its manifest once and pass the file: "
            f"hivetrain manifest {repository} --revision {revision} --out manifest.json"
        )
    downloader = Downloader(headers=access_headers(), before_request=Pacer(requests_per_minute))
    header: list[object] = [repository, revision, config, split, content_key, rows_per_unit]
    files = []
    with Journal(journal_path, header) as journal:
        for path, remote in listed:
            file = journal.get(path)
            if file is None:
                file = _measure(path, remote, downloader, content_key, rows_per_unit, download_dir)
                journal.add(path, file)
            files.append(file)
            if on_file:
                on_file(len(files), len(listed))
        manifest = CorpusManifest(repository, revision, tuple(files), content_key, heldout_units)
        journal.finish()
    return manifest


@dataclass
class Pacer:
    """Spaces out calls so that no minute has more than so many."""

    per_minute: int
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _next: float = 0.0

    def __call__(self) -> None:
        now = self.clock()
        if self._next > now:
            self.sleep(self._next - now)
        self._next = max(now, self._next) + 60.0 / self.per_minute


def fetch_file(downloader: Downloader, remote: RemoteFile, name: str, folder: Path, purpose: str) -> Path:
    """Fetch a whole file into a folder, named by its hash; a file that is there already is not fetched again."""
    suffix = "".join(Path(name).suffixes)
    target = folder / f"{remote.sha256}{suffix}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{target.name}.{os.getpid()}.partial"
    digest, deadline = hashlib.sha256(), downloader.deadline()
    try:
        with partial.open("wb") as out:
            for start in range(0, remote.size_bytes, CHUNK_BYTES):
                stop = min(start + CHUNK_BYTES, remote.size_bytes)
                chunk = downloader.read(remote, start, stop, deadline, purpose)
                digest.update(chunk)
                out.write(chunk)
        if digest.hexdigest() != remote.sha256:
            raise DownloadError(remote.url, f"sha256 is {digest.hexdigest()}, the manifest says {remote.sha256}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def stream_rows(path: Path) -> Any:
    """The rows of a local file through ``datasets``, in order, unshuffled; the format follows from its suffix."""
    from datasets import load_dataset

    return load_dataset(str(path.parent), data_files=path.name, split="train", streaming=True)


def default_download_dir() -> Path:
    """``hivetrain`` in the cache folder of the hub's own library (HF_HOME)."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hivetrain"


def _list_files(repository: str, revision: str, config: str | None, split: str) -> list[tuple[str, RemoteFile]]:
    from huggingface_hub import HfApi, RepoFile, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    paths = _resolve(repository, revision, config, split)
    listed = []
    api = HfApi()
    for start in range(0, len(paths), PATHS_PER_REQUEST):
        part = paths[start : start + PATHS_PER_REQUEST]
        try:
            found = api.get_paths_info(repository, part, revision=revision, repo_type="dataset")
        except HfHubHTTPError as error:
            raise ManifestError(f"{repository} at {revision}: {str(error).splitlines()[0]}") from error
        facts = {entry.path: entry for entry in found if isinstance(entry, RepoFile)}
        for path in part:
            if path not in facts:
                raise ManifestError(f"{repository}: the hub does not list {path} at {revision}")
            url = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
            lfs = facts[path].lfs
            listed.append((path, RemoteFile(url, facts[path].size, lfs.sha256 if lfs else "", revision)))
    return listed


def _resolve(repository: str, revision: str, config: str | None, split: str) -> list[str]:
    """Paths of the files of a split, as ``datasets`` understands the repository."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(repository, name=config, revision=revision)
    except Exception as error:  # datasets raises a dozen unrelated types here, bare ones among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ManifestError(f"{repository} at {revision}: {reason}") from error
    data_files = builder.config.data_files or {}
    if split not in data_files:
        raise ManifestError(f"{repository} has no split {split!r}, but {', '.join(map(str, data_files)) or 'no files'}")
    prefix = f"hf://datasets/{repository}@{revision}/"
    foreign = [name for name in data_files[split] if not name.startswith(prefix)]
    if foreign:
        raise ManifestError(f"{repository}: {foreign[0]} lies outside the pinned repository")
    return [name.removeprefix(prefix) for name in data_files[split]]


def _measure(
    path: str, remote: RemoteFile, downloader: Downloader, content_key: str, rows_per_unit: int, download_dir: Path
) -> ManifestFile:
    deadline = downloader.deadline()
    try:
        if not remote.sha256:
            # Small files are kept in git itself, which knows no sha256: hash what the commit holds.
            content = downloader.read(remote, 0, remote.size_bytes, deadline, path)
            remote = RemoteFile(remote.url, remote.size_bytes, hashlib.sha256(content).hexdigest(), remote.commit)
        if path.endswith(".parquet"):
            with pq.ParquetFile(RangeFile(downloader, remote, deadline, path)) as parquet:
                column = content_column(parquet.schema_arrow, content_key)
                if isinstance(column, str):
                    raise ManifestError(f"{remote.url}: {column}")
                return ManifestFile(path, remote.size_bytes, remote.sha256, parquet_rows(parquet.metadata))
        local = fetch_file(downloader, remote, path, download_dir, path)
        count = sum(1 for _ in stream_rows(local))
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ManifestError(f"{remote.url}: not a readable file ({reason})") from error
    rows = [rows_per_unit] * (count // rows_per_unit) + [count % rows_per_unit]
    return ManifestFile(path, remote.size_bytes, file_sha256(local), tuple(n for n in rows if n))
