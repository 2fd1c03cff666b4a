"""Text to token ids, behind one interface: tiktoken for GPT-2's vocabulary, ``tokenizers`` for all others.

The surprising fact: characters that spell a special token inside a document stay ordinary text. Only the packer writes
the end-of-text token, so its places are exactly the ends of documents.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hivetrain.data.corpus import ASSETS
from hivetrain.data.errors import TokenizerError
from hivetrain.data.manifest import file_sha256

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
MAX_TOKENIZER_BYTES = 100 << 20


class Encoder(ABC):
    """A vocabulary and the way text is cut into it."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """Number of ids; every id is below it."""

    @property
    @abstractmethod
    def vocabulary_sha256(self) -> str:
        """Hash that names the vocabulary: equal hashes give equal ids."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id written after each document."""

    @abstractmethod
    def encode(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each document, without any special token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""


class TiktokenEncoder(Encoder):
    """GPT-2's byte-pair vocabulary in tiktoken, from its two files: no download.

    Args:
        folder: Holds ``encoder.json`` and ``vocab.bpe``.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str  # type: ignore[import-untyped]

        encoder, merges = self._files
        try:
            # With their hashes given, tiktoken cannot take other bytes from its cache of files.
            ranks = data_gym_to_mergeable_bpe_ranks(
                str(merges), str(encoder), file_sha256(merges), file_sha256(encoder)
            )
        except (ValueError, KeyError, AssertionError) as error:
            raise TokenizerError(
                f"{self.folder}: encoder.json and vocab.bpe do not fit each other ({error})"
            ) from error
        return tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: len(ranks)}
        )

    @property
    def _files(self) -> tuple[Path, Path]:
        encoder, merges = self.folder / "encoder.json", self.folder / "vocab.bpe"
        for path in (encoder, merges):
            if not path.is_file():
                raise TokenizerError(f"{path} is missing: GPT-2's vocabulary is encoder.json and vocab.bpe together")
        return encoder, merges

    @property
    def vocabulary_size(self) -> int:
        return self._encoding.n_vocab

    @cached_property
    def vocabulary_sha256(self) -> str:
        return hashlib.sha256(" ".join(file_sha256(path) for path in self._files).encode()).hexdigest()

    @property
    def eos_id(self) -> int:
        return self._encoding.eot_token

    def encode(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        encode = self._encoding.encode_to_numpy
        return [encode(document, disallowed_special=()) for document in documents]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids))


class TokenizersEncoder(Encoder):
    """Any ``tokenizer.json`` of the ``tokenizers`` library.

    Args:
        path: The file.
        eos_token: The end-of-text token; by default the one common name that the vocabulary has.
    """

    def __init__(self, path: str | os.PathLike[str], eos_token: str | None = None) -> None:
        self.path = Path(path)
        self.eos_token = eos_token

    @cached_property
    def _content(self) -> bytes:
        if self.path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise TokenizerError(f"{self.path}: larger than {MAX_TOKENIZER_BYTES} bytes")
        return self.path.read_bytes()

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for anything malformed
            raise TokenizerError(f"{self.path}: not a tokenizer.json ({error})") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return tokenizer

    @property
    def vocabulary_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def vocabulary_sha256(self) -> str:
        return hashlib.sha256(self._content).hexdigest()

    @cached_property
    def eos_id(self) -> int:
        names = [self.eos_token] if self.eos_token else list(END_OF_TEXT)
        found = [name for name in names if self._tokenizer.token_to_id(name) is not None]
        if len(found) != 1:
            problem = f"has {' and '.join(found)}" if found else f"has none of {', '.join(names)}"
            raise TokenizerError(f"{self.path}: {problem}. Set eos_token to its end-of-text token.")
        return self._tokenizer.token_to_id(found[0])

    def encode(self, documents: Sequence[str]) -> list[NDArray[np.uint32]]:
        encodings = self._tokenizer.encode_batch_fast(list(documents), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def load_encoder(name: str, eos_token: str | None = None) -> Encoder:
    """Find a tokenizer.

    Args:
        name: ``embedded`` (4,096 ids, trained on the embedded corpus), ``gpt2`` (50,257 ids), the path of a
            ``tokenizer.json`` or of a folder with one (or with GPT-2's two files), or ``owner/name@commit`` on the hub.
        eos_token: The end-of-text token, where its name is not a common one.

    Raises:
        TokenizerError: There is no such tokenizer.
    """
    path = Path(name)
    if name == "embedded":
        return TokenizersEncoder(ASSETS / "tokenizers" / "embedded" / "tokenizer.json")
    if name == "gpt2":
        return TiktokenEncoder(ASSETS / "tokenizers" / "gpt2")
    if (path / "tokenizer.json").is_file():
        return TokenizersEncoder(path / "tokenizer.json", eos_token)
    if (path / "vocab.bpe").is_file():
        return TiktokenEncoder(path)
    if path.is_file():
        return TokenizersEncoder(path, eos_token)
    if path.suffix == ".json" or name.startswith((".", "/", "~")):
        raise TokenizerError(f"tokenizer {name}: no such file or folder")
    return TokenizersEncoder(_download(name), eos_token)


def _download(name: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    if len(revision) != 40:
        raise TokenizerError(
            f"tokenizer {name!r} is neither 'embedded', 'gpt2' nor a file. "
            "For one on the hub pin its commit: owner/name@<40 hexadecimal digits>."
        )
    try:
        return hf_hub_download(repository, "tokenizer.json", revision=revision, etag_timeout=10)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TokenizerError(
            f"tokenizer {name}: cannot be fetched from the hub ({str(error).splitlines()[0]})"
        ) from error


def data_digest(manifest_digest: str, encoder: Encoder, block_size: int) -> str:
    """Name of a stream of blocks: the corpus, the vocabulary and the block size together."""
    parts = {
        "manifest": manifest_digest,
        "vocabulary": encoder.vocabulary_sha256,
        "eos": encoder.eos_id,
        "block": block_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
