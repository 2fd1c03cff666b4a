"""Documents to blocks of equal length: joined with one end-of-text token after each, cut, never padded.

A unit is packed alone; its tail shorter than a block is dropped. The surprising fact: since end-of-text never occurs
inside a document, the ends of documents can be read off the blocks, and no mask needs to be stored.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger]


def join_documents(documents: Sequence[NDArray[np.uint32]], eos_id: int, vocabulary_size: int) -> Tokens:
    """All ids of a unit in one array, an end-of-text id after each document; uint16 where the vocabulary allows it."""
    out = np.empty(sum(map(len, documents)) + len(documents), dtype=token_dtype(vocabulary_size))
    end = 0
    for ids in documents:
        out[end : end + len(ids)] = ids
        end += len(ids) + 1
        out[end - 1] = eos_id
    return out


def cut_blocks(tokens: Tokens, block_size: int) -> Tokens:
    """A view of the tokens as (blocks, block_size), without the tail."""
    count = len(tokens) // block_size
    return tokens[: count * block_size].reshape(count, block_size)


def token_dtype(vocabulary_size: int) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


def document_positions(blocks: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Positions that start again at 0 after each end-of-text, for blocks of shape (B, T)."""
    places = torch.arange(blocks.shape[1]).expand_as(blocks)
    after_eos = torch.zeros_like(blocks)
    after_eos[:, 1:] = torch.where(blocks[:, :-1] == eos_id, places[:, 1:], 0)
    return places - after_eos.cummax(dim=1).values


def document_mask(positions: torch.Tensor) -> torch.Tensor:
    """What is added to attention scores so that a token sees only earlier tokens of its own document.

    Args:
        positions: From ``document_positions``, (B, T).

    Returns:
        0 where attention is allowed and the lowest float elsewhere, (B, 1, T, T). Added numbers mean the same to every
        attention of transformers; a bool mask would not, and position ids alone isolate only where no cache is used.
    """
    document = (positions == 0).cumsum(dim=1)
    allowed = (document[:, :, None] == document[:, None, :]).tril()
    return torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[:, None]
