import lightning.pytorch as pl
import pytest
import torch

from hivetrain.data import EmbeddedCorpus, FolderCorpus, RefinedWebDataModule
from hivetrain.data.errors import DataError


class Recorder(pl.LightningModule):
    """Trains a single number and keeps every batch it was given."""

    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))
        self.train_batches, self.val_batches = [], []

    def training_step(self, batch, batch_idx):
        self.train_batches.append(batch["input_ids"])
        return self.number * 1.0

    def validation_step(self, batch, batch_idx):
        self.val_batches.append(batch["input_ids"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def test_batches_are_full_int64_blocks_with_ids_below_the_vocabulary_size():
    data = RefinedWebDataModule(block_size=128, batch_size=4)
    data.setup("fit")
    for batch, _ in zip(data.train_dataloader(), range(20), strict=False):
        assert set(batch) == {"input_ids"}
        assert batch["input_ids"].shape == (4, 128)
        assert batch["input_ids"].dtype == torch.int64
        assert 0 <= batch["input_ids"].min() <= batch["input_ids"].max() < data.vocabulary_size == 4096


def test_held_out_blocks_are_the_addresses_of_2015_and_later():
    data = RefinedWebDataModule(block_size=128, batch_size=64)
    data.setup("fit")
    text = " ".join(data.encoder.decode(row.tolist()) for batch in data.val_dataloader() for row in batch["input_ids"])
    assert "Biden" in text
    assert "COVID" in text
    assert "General Washington" not in text
    training = " ".join(document for unit in range(90) for document in EmbeddedCorpus().read_unit(unit))
    assert "COVID" not in training
    assert "General Washington" in training


def test_validation_can_be_limited_to_a_number_of_blocks():
    data = RefinedWebDataModule(block_size=128, batch_size=4, val_blocks=10)
    data.setup("validate")
    assert [len(batch["input_ids"]) for batch in data.val_dataloader()] == [4, 4, 2]


def test_lightning_fit_trains_on_the_stream_and_validates_between(tmp_path):
    data, model = RefinedWebDataModule(block_size=64, batch_size=2, val_blocks=4, slot=5), Recorder()
    options = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    trainer(tmp_path, **options).fit(model, datamodule=data)
    alone = RefinedWebDataModule(block_size=64, batch_size=2, slot=5)
    for seen, batch in zip(model.train_batches, alone.train_dataloader(), strict=False):
        assert torch.equal(seen, batch["input_ids"])
    assert len(model.train_batches) == 6
    assert len(model.val_batches) == 4
    assert data.cursor.consumed == 12


def test_a_corpus_without_held_out_units_trains_but_refuses_to_validate(tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question. " * 100)
    data = RefinedWebDataModule(FolderCorpus(tmp_path), block_size=32, batch_size=2)
    trainer(tmp_path, max_steps=2).fit(Recorder(), datamodule=data)
    with pytest.raises(DataError, match="heldout_units"):
        trainer(tmp_path).validate(Recorder(), datamodule=data, verbose=False)
