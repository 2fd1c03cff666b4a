"""Training of a byte-level BPE on a corpus with ``tokenizers``; the embedded tokenizer was made by it.

The surprising fact: held-out units are never read, so the vocabulary knows nothing of the validation text.
"""

import os
from collections.abc import Callable, Iterator

from hivetrain.data.corpus import Corpus
from hivetrain.data.errors import TokenizerError

EOS_TOKEN = "<|endoftext|>"


def train_bpe(
    corpus: Corpus,
    vocabulary_size: int,
    path: str | os.PathLike[str],
    max_units: int | None = None,
    on_unit: Callable[[int, int], None] | None = None,
    show_progress: bool = False,
) -> None:
    """Train a byte-level BPE in the manner of GPT-2 and write it as ``tokenizer.json``.

    Args:
        corpus: Its training units are read in order.
        vocabulary_size: Ids in all: the end-of-text token (id 0), 256 bytes, and merges.
        path: Where the file goes.
        max_units: Read only so many units.
        on_unit: Called with (units read, units in all).
        show_progress: Let ``tokenizers`` draw its own progress bars on stderr.

    Raises:
        TokenizerError: The vocabulary is too small to hold all bytes, or the corpus too small for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size <= len(alphabet):
        raise TokenizerError(f"a vocabulary of {vocabulary_size} cannot hold the {len(alphabet)} bytes and {EOS_TOKEN}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(alphabet),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(_units(corpus, max_units, on_unit), trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        raise TokenizerError(
            f"the text has only {tokenizer.get_vocab_size()} tokens to learn, {vocabulary_size} were asked for"
        )
    tokenizer.save(str(path), pretty=False)


def _units(corpus: Corpus, max_units: int | None, on_unit: Callable[[int, int], None] | None) -> Iterator[list[str]]:
    count = min(corpus.manifest.n_train_units, max_units or corpus.manifest.n_train_units)
    for unit in range(count):
        yield corpus.read_unit(unit)
        if on_unit:
            on_unit(unit + 1, count)
