"""What a corpus is: a manifest and ``read_unit``; and the corpus that ships with hivetrain.

The surprising fact: a unit with anything wrong in it is an error, never skipped, because nobody else could recompute a
stream with silent holes.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

from hivetrain.data.errors import ManifestError, UnitError
from hivetrain.data.manifest import CorpusManifest

ASSETS = Path(__file__).parent / "assets"
MAX_DOCUMENT_BYTES = 10 << 20
MAX_UNIT_BYTES = 512 << 20


class Corpus(ABC):
    """Text in numbered units. Instances are cheap to make, touch nothing before first use, and can be pickled."""

    @property
    @abstractmethod
    def manifest(self) -> CorpusManifest:
        """The description whose digest names this data; loaded or built on first use."""

    @abstractmethod
    def read_documents(self, unit: int) -> list[str | None]:
        """The documents of one unit as they are stored. Raises UnitError."""

    def read_unit(self, unit: int) -> list[str]:
        """The documents of one unit, checked.

        Raises:
            UnitError: The unit cannot be read, has another number of rows than the manifest says, or holds a missing,
                empty or oversized document.
        """
        index, row_group = self.manifest.locate(unit)
        file = self.manifest.files[index]

        def wrong(reason: str) -> UnitError:
            return UnitError(reason, unit=unit, file=file.path, row_group=row_group)

        documents = self.read_documents(unit)
        if len(documents) != file.rows[row_group]:
            raise wrong(f"has {len(documents)} rows, the manifest says {file.rows[row_group]}")
        for row, document in enumerate(documents):
            if not document:
                raise wrong(f"row {row} has no text. Remove empty documents from the data set.")
            if len(document) > MAX_DOCUMENT_BYTES // 4 and len(document.encode()) > MAX_DOCUMENT_BYTES:
                raise wrong(f"row {row} has {len(document)} characters, above the limit of {MAX_DOCUMENT_BYTES} bytes")
        return documents  # type: ignore[return-value]  # every entry was just seen to be a non-empty str


def check_agreement(manifest: CorpusManifest, content_key: str, heldout_units: int) -> None:
    """Refuse settings that a given manifest contradicts; the defaults, ``content`` and 0, leave them to it."""
    for name, ours, theirs, default in (
        ("content_key", content_key, manifest.content_key, "content"),
        ("heldout_units", heldout_units, manifest.heldout_units, 0),
    ):
        if ours not in (theirs, default):
            raise ManifestError(
                f"{name} is {ours!r}, but the manifest of {manifest.repository} says {theirs!r}. "
                "Leave it out, or build the manifest again."
            )


class EmbeddedCorpus(Corpus):
    """State of the Union addresses, shipped with hivetrain: 1790-2014 to train on, 2015-2026 held out."""

    @cached_property
    def _folder(self) -> Corpus:
        from hivetrain.data.folder import FolderCorpus

        return FolderCorpus(ASSETS / "corpus", manifest=ASSETS / "corpus" / "manifest.json")

    @property
    def manifest(self) -> CorpusManifest:
        return self._folder.manifest

    def read_documents(self, unit: int) -> list[str | None]:
        return self._folder.read_documents(unit)
