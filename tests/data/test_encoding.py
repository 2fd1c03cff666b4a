import json

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models

from hivetrain.data import EmbeddedCorpus, TokenizersEncoder, load_encoder
from hivetrain.data.bpe import train_bpe
from hivetrain.data.corpus import ASSETS
from hivetrain.data.errors import TokenizerError

AWKWARD = [
    "plain text",
    "emoji \U0001f642\U0001f469\u200d\U0001f680 and \u0645\u0631\u062d\u0628\u0627 \u4f60\u597d",
    "lines\r\nand\rmore\n\n\n",
    "a NUL \x00 inside, a BOM \ufeff, a replacement \ufffd",
    "before <|endoftext|> after<|endoftext|>",
    "  leading, trailing and    many    spaces   ",
    "\t\ttabs\tand\u00a0no-break\u2003spaces",
    "it's they'LL we've I'd 'S 1234567890 3.14 x=y_z;",
    "e\u0301 decomposed, \u00e9 composed, \U0001d518 astral",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\n",
    " ",
]


@pytest.fixture(scope="module")
def gpt2_by_tokenizers(tmp_path_factory):
    """GPT-2's vocabulary in the other library."""
    folder = ASSETS / "tokenizers" / "gpt2"
    tokenizer = ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"), add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer.save(str(path))
    return TokenizersEncoder(path)


def test_both_libraries_give_the_same_ids_for_gpt2_on_awkward_text(gpt2_by_tokenizers, documents):
    texts = AWKWARD + documents[:100]
    ours = load_encoder("gpt2").encode(texts)
    theirs = gpt2_by_tokenizers.encode(texts)
    for text, one, other in zip(texts, ours, theirs, strict=True):
        assert one.tolist() == other.tolist(), text


def test_gpt2_ids_are_the_published_ones(gpt2_by_tokenizers):
    encoder = load_encoder("gpt2")
    assert encoder.encode(["Hello world"])[0].tolist() == [15496, 995]
    assert encoder.eos_id == gpt2_by_tokenizers.eos_id == 50256
    assert encoder.vocabulary_size == gpt2_by_tokenizers.vocabulary_size == 50257


@pytest.mark.parametrize("name", ["embedded", "gpt2"])
def test_awkward_text_survives_and_never_contains_end_of_text(name):
    encoder = load_encoder(name)
    for text, ids in zip(AWKWARD, encoder.encode(AWKWARD), strict=True):
        assert encoder.decode(ids.tolist()) == text
        assert encoder.eos_id not in ids
        assert ids.dtype == np.uint32
        assert ids.max() < encoder.vocabulary_size


def test_vocabularies_have_different_hashes_and_the_same_hash_each_time(gpt2_by_tokenizers):
    hashes = {load_encoder(name).vocabulary_sha256 for name in ("embedded", "gpt2", "embedded", "gpt2")}
    assert len(hashes | {gpt2_by_tokenizers.vocabulary_sha256}) == 3


def test_an_unknown_tokenizer_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match="pin its commit"):
        load_encoder("owner/name")
    with pytest.raises(TokenizerError, match="no such file"):
        load_encoder(str(tmp_path / "tokenizer.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        _ = load_encoder(str(broken)).vocabulary_size


def test_a_tokenizer_without_a_known_end_of_text_asks_for_its_name(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "stop": 1}, unk_token="a")).save(str(path))
    with pytest.raises(TokenizerError, match="Set eos_token"):
        _ = load_encoder(str(path)).eos_id
    assert load_encoder(str(tmp_path), eos_token="stop").eos_id == 1


def test_truncation_and_padding_inside_a_tokenizer_file_are_ignored(tmp_path):
    body = json.loads((ASSETS / "tokenizers" / "embedded" / "tokenizer.json").read_text())
    body["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(body))
    assert len(load_encoder(str(path)).encode(["a long text of many words, longer than three"])[0]) > 3


def test_the_embedded_tokenizer_is_what_its_script_makes(tmp_path):
    train_bpe(EmbeddedCorpus(), 4096, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (
        ASSETS / "tokenizers" / "embedded" / "tokenizer.json"
    ).read_bytes()


def test_a_vocabulary_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="cannot hold"):
        train_bpe(EmbeddedCorpus(), 256, tmp_path / "t.json")
    with pytest.raises(TokenizerError, match="only"):
        train_bpe(EmbeddedCorpus(), 500_000, tmp_path / "t.json", max_units=1)
