import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from hivetrain.data import FolderCorpus, load_encoder
from hivetrain.data.packing import cut_blocks, document_mask, document_positions, join_documents
from hivetrain.data.stream import unit_tokens

EOS = 0


def join(documents):
    return join_documents([np.array(ids, dtype=np.uint32) for ids in documents], EOS, 100)


@given(st.lists(st.lists(st.integers(1, 99), max_size=30), max_size=20), st.integers(1, 16))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_blocks_hold_every_token_in_order_with_one_end_of_text_each_and_only_the_tail_dropped(documents, block_size):
    expected = [token for ids in documents for token in [*ids, EOS]]
    blocks = cut_blocks(join(documents), block_size)
    kept = len(expected) // block_size * block_size
    assert blocks.reshape(-1).tolist() == expected[:kept]
    assert blocks.shape == (kept // block_size, block_size)


def test_tokens_take_two_bytes_where_the_vocabulary_allows_it():
    ids = [np.array([5], dtype=np.uint32)]
    assert join_documents(ids, 0, 1 << 16).dtype == np.uint16
    assert join_documents([np.array([65536], dtype=np.uint32)], 0, (1 << 16) + 1).tolist() == [65536, 0]


def test_a_unit_of_five_hundred_rows_drops_at_most_three_in_a_thousand_tokens(tmp_path, documents, write_parquet):
    write_parquet(tmp_path / "a.parquet", documents, 500)
    corpus, encoder = FolderCorpus(tmp_path), load_encoder("gpt2")
    for unit in range(4):
        tokens = unit_tokens(corpus, encoder, unit)
        assert (tokens == encoder.eos_id).sum() == 500
        assert 1 - cut_blocks(tokens, 512).size / tokens.size <= 0.003


def test_positions_start_again_after_each_end_of_text():
    blocks = torch.tensor([[5, 6, EOS, 7, EOS, EOS, 8, 9], [EOS, 1, 2, 3, 4, 5, 6, 7]])
    assert document_positions(blocks, EOS).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changing_one_document_does_not_change_the_logits_of_the_next(attention, use_cache, dtype):
    torch.manual_seed(0)
    model = small_gpt2(attention).to(dtype)
    one = torch.randint(1, 50, (3, 40))
    one[:, 17] = EOS
    other = one.clone()
    other[:, :17] = torch.randint(1, 50, (3, 17))

    def logits(blocks, isolated):
        positions = document_positions(blocks, EOS)
        extra = {"position_ids": positions, "attention_mask": document_mask(positions).to(dtype)} if isolated else {}
        with torch.no_grad():
            return model(input_ids=blocks, use_cache=use_cache, **extra).logits.float()

    changed = (logits(one, True) - logits(other, True)).abs()
    assert changed[:, :18].max() > 1e-3
    assert changed[:, 18:].max() == 0
    assert (logits(one, False) - logits(other, False)).abs()[:, 18:].max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_isolated_document_has_the_logits_that_it_has_alone(attention):
    torch.manual_seed(1)
    model = small_gpt2(attention)
    blocks = torch.randint(1, 50, (2, 30))
    blocks[:, 11] = blocks[:, 20] = EOS
    positions = document_positions(blocks, EOS)
    with torch.no_grad():
        packed = model(input_ids=blocks, position_ids=positions, attention_mask=document_mask(positions)).logits
        alone = model(input_ids=blocks[:, 12:21]).logits
    assert torch.allclose(packed[:, 12:21], alone, atol=1e-5)


def small_gpt2(attention):
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=64, bos_token_id=EOS, eos_token_id=EOS,
        attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()
