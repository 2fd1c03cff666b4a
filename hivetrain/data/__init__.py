"""Text for training that anybody can recompute: corpora, encoders, the assignment of units, and the data module."""

from hivetrain.data.assignment import DataAssignment, slot_of_peer
from hivetrain.data.corpus import Corpus, EmbeddedCorpus
from hivetrain.data.encoding import Encoder, TiktokenEncoder, TokenizersEncoder, data_digest, load_encoder
from hivetrain.data.folder import FolderCorpus
from hivetrain.data.manifest import CorpusManifest, ManifestFile
from hivetrain.data.module import RefinedWebDataModule
from hivetrain.data.stream import BlockAddress, Cursor

__all__ = [
    "BlockAddress",
    "Corpus",
    "CorpusManifest",
    "Cursor",
    "DataAssignment",
    "EmbeddedCorpus",
    "Encoder",
    "FolderCorpus",
    "ManifestFile",
    "RefinedWebDataModule",
    "TiktokenEncoder",
    "TokenizersEncoder",
    "data_digest",
    "load_encoder",
    "slot_of_peer",
]
