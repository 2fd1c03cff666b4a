"""A data module of countable bytes for tests: quick to learn, no files, no network."""

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class Letters:
    """One token for each letter from a to p."""

    def encode(self, documents: list[str]) -> list[np.ndarray]:
        return [np.array([(ord(letter) - ord("a")) % 16 for letter in text]) for text in documents]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token) for token in tokens)


class CountingData(LightningDataModule):
    """Rows that count upwards from a different start each; the validation rows are rows of the same kind."""

    def __init__(self, rows: int = 64, batch_size: int = 4, block_size: int = 16, vocabulary_size: int = 16) -> None:
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
        self.block_size, self.vocabulary_size = block_size, vocabulary_size
        self.encoder = Letters()

    def train_dataloader(self) -> DataLoader:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(7)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _loader(self, shift: int) -> DataLoader:
        starts = torch.arange(self.rows)[:, None] * 5 + shift
        tokens = (starts + torch.arange(self.block_size)[None, :]) % self.vocabulary_size
        return DataLoader([{"input_ids": row} for row in tokens], batch_size=self.batch_size)
