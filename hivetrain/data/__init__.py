"""Text for training that anybody can recompute: corpora, encoders, the assignment of units, and the data module.

Only the data module needs Lightning, which takes seconds to import: it is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hivetrain.data.assignment import DataAssignment, slot_of_peer
from hivetrain.data.audit import BlockClaim, Verdict, block, check_claim, tokens_sha256
from hivetrain.data.corpus import Corpus, EmbeddedCorpus
from hivetrain.data.encoding import Encoder, TiktokenEncoder, TokenizersEncoder, data_digest, load_encoder
from hivetrain.data.folder import FolderCorpus
from hivetrain.data.hub import HubCorpus
from hivetrain.data.manifest import CorpusManifest, ManifestFile
from hivetrain.data.reader import SlotReader
from hivetrain.data.stream import BlockAddress, Cursor

if TYPE_CHECKING:
    from hivetrain.data.module import RefinedWebDataModule

__all__ = [
    "BlockAddress",
    "BlockClaim",
    "Corpus",
    "CorpusManifest",
    "Cursor",
    "DataAssignment",
    "EmbeddedCorpus",
    "Encoder",
    "FolderCorpus",
    "HubCorpus",
    "ManifestFile",
    "RefinedWebDataModule",
    "SlotReader",
    "TiktokenEncoder",
    "TokenizersEncoder",
    "Verdict",
    "block",
    "check_claim",
    "data_digest",
    "load_encoder",
    "slot_of_peer",
    "tokens_sha256",
]


def __getattr__(name: str) -> Any:
    if name == "RefinedWebDataModule":
        return import_module("hivetrain.data.module").RefinedWebDataModule
    raise AttributeError(f"module 'hivetrain.data' has no attribute {name!r}")
