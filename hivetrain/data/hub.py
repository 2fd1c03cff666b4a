"""A data set on the Hugging Face hub as a corpus, at a pinned commit.

Parquet row groups are read directly by byte range. The surprising fact: only the text column of one row group travels,
so a machine can train on a corpus of terabytes without storing any of it.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hivetrain.data.corpus import Corpus, check_agreement
from hivetrain.data.download import Downloader, DownloadError, RangeFile, RemoteFile, Retry
from hivetrain.data.errors import HubError, ManifestError, UnitError
from hivetrain.data.folder import read_row_group
from hivetrain.data.manifest import CorpusManifest, ManifestFile

FOOTERS_KEPT = 32
MAX_FILES_WITHOUT_MANIFEST = 50


class HubCorpus(Corpus):
    """Any text data set on the hub; RefinedWeb's column is the default.

    Args:
        repository: ``owner/name``, such as ``tiiuae/falcon-refinedweb``.
        revision: The commit, 40 hexadecimal digits.
        manifest: A file made by ``hivetrain manifest``, which then settles split, units and held-out units. Without one
            it is built on first use, which reads the end of every file; refused above 50 files.
        config: The configuration (subset), where the data set has several.
        split: The split to train on.
        content_key: The column that holds the text.
        heldout_units: How many units at the end are kept for validation.
        rows_per_unit: Documents per unit where the data set has no parquet files.
        deadline_s: Longest time for one unit, retries included.
        download_dir: Where files that are not parquet are kept, for they cannot be read in parts; by default
            ``hivetrain`` in the cache folder of the hub's own library.
    """

    def __init__(
        self,
        repository: str,
        revision: str,
        manifest: str | os.PathLike[str] | None = None,
        config: str | None = None,
        split: str = "train",
        content_key: str = "content",
        heldout_units: int = 0,
        rows_per_unit: int = 500,
        deadline_s: float = 300.0,
        download_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_pinned(repository, revision)
        self.repository = repository
        self.revision = revision
        self.manifest_path = manifest
        self.config = config
        self.split = split
        self.content_key = content_key
        self.heldout_units = heldout_units
        self.rows_per_unit = rows_per_unit
        self.download_dir = download_dir
        self.deadline_s = deadline_s
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    @cached_property
    def downloader(self) -> Downloader:
        """Reads the hub; made on first use."""
        return Downloader(Retry(deadline_s=self.deadline_s), headers=access_headers())

    @cached_property
    def manifest(self) -> CorpusManifest:
        if self.manifest_path is None:
            from hivetrain.data.hub_manifest import manifest_of_hub

            return manifest_of_hub(
                self.repository,
                self.revision,
                config=self.config,
                split=self.split,
                content_key=self.content_key,
                heldout_units=self.heldout_units,
                rows_per_unit=self.rows_per_unit,
                download_dir=self._download_dir,
                max_files=MAX_FILES_WITHOUT_MANIFEST,
            )
        manifest = CorpusManifest.load(self.manifest_path)
        if (manifest.repository, manifest.revision) != (self.repository, self.revision):
            raise ManifestError(
                f"{self.manifest_path} describes {manifest.repository} at {manifest.revision}, "
                f"not {self.repository} at {self.revision}"
            )
        check_agreement(manifest, self.content_key, self.heldout_units)
        return manifest

    def read_documents(self, unit: int) -> list[str | None]:
        index, row_group = self.manifest.locate(unit)
        file = self.manifest.files[index]
        remote = remote_file(self.manifest, file)

        def wrong(reason: str) -> UnitError:
            return HubError(reason, unit=unit, file=remote.url, row_group=row_group)

        try:
            if file.path.endswith(".parquet"):
                return self._read_row_group(remote, unit, row_group, wrong)
            return self._read_rows(file, remote, unit, row_group, wrong)
        except DownloadError as error:
            raise wrong(error.reason) from error
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise wrong((str(error).splitlines() or [type(error).__name__])[0]) from error

    def _read_row_group(
        self, remote: RemoteFile, unit: int, row_group: int, wrong: Callable[[str], UnitError]
    ) -> list[str | None]:
        source = RangeFile(self.downloader, remote, self.downloader.deadline(), f"unit {unit}")
        footer = self._footers.get(remote.url)
        with pq.ParquetFile(source, metadata=footer, pre_buffer=True) as parquet:
            documents = read_row_group(parquet, row_group, self.manifest.content_key, wrong)
            self._footers[remote.url] = parquet.metadata
        self._footers.move_to_end(remote.url)
        while len(self._footers) > FOOTERS_KEPT:
            self._footers.popitem(last=False)
        return documents

    def _read_rows(
        self, file: ManifestFile, remote: RemoteFile, unit: int, group: int, wrong: Callable[[str], UnitError]
    ) -> list[str | None]:
        from hivetrain.data.hub_manifest import fetch_file, stream_rows

        path = fetch_file(self.downloader, remote, file.path, self._download_dir, f"unit {unit}")
        first = sum(file.rows[:group])
        documents: list[str | None] = []
        for row in stream_rows(path).skip(first).take(file.rows[group]):
            if self.manifest.content_key not in row:
                raise wrong(f"has no column {self.manifest.content_key!r} but {', '.join(row)}. Set content_key.")
            text = row[self.manifest.content_key]
            if text is not None and not isinstance(text, str):
                raise wrong(f"column {self.manifest.content_key!r} holds {type(text).__name__}, not text")
            documents.append(text)
        return documents

    @property
    def _download_dir(self) -> Path:
        from hivetrain.data.hub_manifest import default_download_dir

        return Path(self.download_dir) if self.download_dir is not None else default_download_dir()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_footers": OrderedDict()}


def access_headers() -> dict[str, str]:
    """Headers that name us to the hub, with the user's access token where there is one."""
    from huggingface_hub import utils

    return utils.build_hf_headers()  # type: ignore[attr-defined]  # documented, but not re-exported for type checkers


def check_pinned(repository: str, revision: str) -> None:
    """Refuse a revision that is not a commit, because a branch or a tag can move."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ManifestError(
            f"revision {revision!r} of {repository} is not pinned: a branch or tag can move. "
            "Give the 40 hexadecimal digits of a commit (listed under 'History' on the data set's page)."
        )


def remote_file(manifest: CorpusManifest, file: ManifestFile) -> RemoteFile:
    """Where a file of a manifest is, and what it must be."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(manifest.repository, file.path, repo_type="dataset", revision=manifest.revision)
    return RemoteFile(url, file.size_bytes, file.sha256, manifest.revision)
