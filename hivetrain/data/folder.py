"""A folder of parquet, jsonl or txt files as a corpus.

A unit is a parquet row group, a run of jsonl lines, or a run of whole txt files. The surprising fact: a file is hashed
when the first unit of it is read, so bytes that differ from the manifest are refused before they are trained on.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hivetrain.data.corpus import MAX_UNIT_BYTES, Corpus, check_agreement
from hivetrain.data.errors import ManifestError, UnitError
from hivetrain.data.journal import Journal
from hivetrain.data.manifest import CorpusManifest, ManifestFile, file_sha256

SUFFIXES = (".parquet", ".jsonl", ".txt")


class FolderCorpus(Corpus):
    """Any folder of ``*.parquet``, ``*.jsonl`` or ``*.txt`` files, in the order of their paths, txt files last.

    Args:
        path: The folder; subfolders are included.
        manifest: A manifest file made by ``hivetrain manifest``, which then settles what follows. Without one it is
            built on first use, which hashes all files.
        content_key: The column (parquet) or key (jsonl) that holds the text.
        rows_per_unit: Documents per unit in jsonl and txt files; parquet brings its own row groups.
        heldout_units: How many units at the end are kept for validation.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: str | os.PathLike[str] | None = None,
        content_key: str = "content",
        rows_per_unit: int = 500,
        heldout_units: int = 0,
    ) -> None:
        self.path = Path(path)
        self.manifest_path = manifest
        self.content_key = content_key
        self.rows_per_unit = rows_per_unit
        self.heldout_units = heldout_units
        self._checked: set[str] = set()
        self._offsets: dict[str, list[int]] = {}

    @cached_property
    def manifest(self) -> CorpusManifest:
        if self.manifest_path is not None:
            manifest = CorpusManifest.load(self.manifest_path)
            check_agreement(manifest, self.content_key, self.heldout_units)
            return manifest
        return manifest_of_folder(
            self.path,
            content_key=self.content_key,
            rows_per_unit=self.rows_per_unit,
            heldout_units=self.heldout_units,
        )

    def read_documents(self, unit: int) -> list[str | None]:
        index, row_group = self.manifest.locate(unit)
        file = self.manifest.files[index]

        def wrong(reason: str) -> UnitError:
            return UnitError(reason, unit=unit, file=str(self.path / file.path), row_group=row_group)

        try:
            self._check(file, wrong)
            if file.path.endswith(".parquet"):
                source = self.path / file.path
                return read_row_group(pq.ParquetFile(source), row_group, self.manifest.content_key, wrong)
            if file.path.endswith(".jsonl"):
                return self._read_jsonl(file, row_group, wrong)
            members = self.manifest.files[index : index + file.rows[row_group]]
            for member in members:
                self._check(member, wrong)
            return [(self.path / member.path).read_text(encoding="utf-8") for member in members]
        except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
            raise wrong(_first_line(error)) from error

    def _check(self, file: ManifestFile, wrong: Callable[[str], UnitError]) -> None:
        if file.path in self._checked:
            return
        path = self.path / file.path
        if path.stat().st_size != file.size_bytes or file_sha256(path) != file.sha256:
            raise wrong(
                f"{file.path} is not the file that the manifest describes (sha256 differs). Restore it or rebuild."
            )
        self._checked.add(file.path)

    def _read_jsonl(self, file: ManifestFile, group: int, wrong: Callable[[str], UnitError]) -> list[str | None]:
        path = self.path / file.path
        if file.path not in self._offsets:
            self._offsets[file.path] = [start for start, _ in _jsonl_units(path, list(file.rows))]
        documents: list[str | None] = []
        with path.open("rb") as lines:
            lines.seek(self._offsets[file.path][group])
            for line in lines:
                if len(documents) == file.rows[group]:
                    break
                if line.strip():
                    documents.append(_jsonl_text(line, self.manifest.content_key, len(documents), wrong))
        return documents


def read_row_group(
    parquet: pq.ParquetFile, row_group: int, content_key: str, wrong: Callable[[str], UnitError]
) -> list[str | None]:
    """The text column of one row group; sizes are checked against the footer before anything is read."""
    column = content_column(parquet.schema_arrow, content_key)
    if isinstance(column, str):
        raise wrong(column)
    if row_group >= parquet.num_row_groups:
        raise wrong(f"the file has only {parquet.num_row_groups} row groups")
    size_bytes = parquet.metadata.row_group(row_group).column(column).total_uncompressed_size
    if size_bytes > MAX_UNIT_BYTES:
        raise wrong(
            f"holds {size_bytes} bytes of text, above {MAX_UNIT_BYTES}. Rewrite the file with smaller row groups."
        )
    return parquet.read_row_group(row_group, columns=[content_key]).column(0).to_pylist()


def content_column(schema: pa.Schema, content_key: str) -> int | str:
    """Position of the text column among the leaf columns, or what is wrong with it."""
    if content_key not in schema.names:
        return f"has no column {content_key!r} but {', '.join(schema.names)}. Set content_key."
    kind = schema.field(content_key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return f"column {content_key!r} holds {kind}, not text"
    before = schema.names.index(content_key)
    return sum(_leaves(schema.field(i).type) for i in range(before))


def manifest_of_folder(
    path: str | os.PathLike[str],
    repository: str | None = None,
    content_key: str = "content",
    rows_per_unit: int = 500,
    heldout_units: int = 0,
    on_file: Callable[[int, int], None] | None = None,
    journal_path: Path | None = None,
) -> CorpusManifest:
    """Hash and measure all files of a folder.

    Args:
        path: The folder.
        repository: Name in the manifest; the folder's name by default.
        content_key: The column or key that holds the text.
        rows_per_unit: Documents per unit in jsonl and txt files.
        heldout_units: Units at the end that are kept for validation.
        on_file: Called with (files done, files in all) after each file.
        journal_path: Finished files are written here, so that a second call goes on where the first was cut off.
    """
    folder = Path(path)
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise ManifestError(f"{folder}: no {', '.join(SUFFIXES)} file in it")
    texts = [name for name in found if name.endswith(".txt")]
    names = [name for name in found if not name.endswith(".txt")] + texts
    # The first file of a run of txt files stands for the whole run, the others have no unit of their own.
    runs = {texts[start]: len(texts[start : start + rows_per_unit]) for start in range(0, len(texts), rows_per_unit)}
    files = []
    with Journal(journal_path, [str(folder.resolve()), content_key, rows_per_unit]) as journal:
        for name in names:
            found_as = f"{name} {(folder / name).stat().st_size} {(folder / name).stat().st_mtime_ns} {runs.get(name)}"
            file = journal.get(found_as)
            if file is None:
                file = _measure(folder, name, content_key, rows_per_unit, runs)
                journal.add(found_as, file)
            files.append(file)
            if on_file:
                on_file(len(files), len(names))
        name = repository or folder.resolve().name
        manifest = CorpusManifest(name, "", tuple(files), content_key, heldout_units)
        journal.finish()
    return manifest


def _measure(folder: Path, name: str, content_key: str, rows_per_unit: int, runs: dict[str, int]) -> ManifestFile:
    source = folder / name
    if name.endswith(".txt"):
        rows: tuple[int, ...] = (runs[name],) if name in runs else ()
    elif name.endswith(".jsonl"):
        rows = tuple(count for _, count in _jsonl_units(source, rows_per_unit))
    else:
        rows = _parquet_rows(source, content_key)
    return ManifestFile(name, source.stat().st_size, file_sha256(source), rows)


def parquet_rows(metadata: pq.FileMetaData) -> tuple[int, ...]:
    """Rows of each row group, from a footer."""
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


def _parquet_rows(path: Path, content_key: str) -> tuple[int, ...]:
    try:
        parquet = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise ManifestError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    with parquet:
        column = content_column(parquet.schema_arrow, content_key)
        if isinstance(column, str):
            raise ManifestError(f"{path}: {column}")
        return parquet_rows(parquet.metadata)


def _jsonl_units(path: Path, rows: int | list[int]) -> Iterator[tuple[int, int]]:
    """Byte offset and number of lines of each unit; blank lines do not count."""
    sizes = iter(rows) if isinstance(rows, list) else itertools.repeat(rows)
    wanted = next(sizes, 0)
    start = position = count = 0
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                if count == wanted:
                    yield start, count
                    start, count, wanted = position, 0, next(sizes, 0)
                count += 1
            position += len(line)
    if count:
        yield start, count


def _jsonl_text(line: bytes, content_key: str, row: int, wrong: Callable[[str], UnitError]) -> str | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise wrong(f"row {row} is not JSON in UTF-8 ({_first_line(error)})") from error
    if not isinstance(record, dict) or content_key not in record:
        raise wrong(f"row {row} has no key {content_key!r}. Set content_key.")
    text = record[content_key]
    if text is not None and not isinstance(text, str):
        raise wrong(f"row {row}: {content_key!r} holds {type(text).__name__}, not text")
    return text


def _leaves(kind: pa.DataType) -> int:
    if pa.types.is_nested(kind):
        return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields))
    return 1


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
