import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch

from hivetrain.data import BlockAddress, DataAssignment, EmbeddedCorpus, FolderCorpus, RefinedWebDataModule
from hivetrain.data.errors import DataError

GOLDEN = {
    ("embedded", 128): "ecb4d4f3675a8fde36022f0a812a307e936cc36ad2a13ff40f06d1e427887dfa",
    ("gpt2", 512): "d4ff259ed681d0513b77ca0f384b4223b64dc15a1f0b04cf788a8fea3114116a",
}

FIRST_BLOCKS = """
import hashlib, itertools, sys
from hivetrain.data import Cursor, DataAssignment, EmbeddedCorpus, data_digest, load_encoder
from hivetrain.data.stream import SlotStream, UnitBlocks
corpus, encoder = EmbeddedCorpus(), load_encoder("embedded")
assignment = DataAssignment(data_digest(corpus.manifest.digest, encoder, 64), 90, n_slots=90)
units = UnitBlocks(corpus, encoder, 64)
stream = SlotStream(units, assignment, 3, Cursor(), 7, int(sys.argv[1]), lambda ids: ids, True)
digest = hashlib.sha256()
for ids in itertools.islice(stream, 80):
    digest.update(ids.numpy().tobytes())
assert not {"hivemind", "bittensor", "lightning"} & set(sys.modules), "auditors need no swarm, chain or trainer"
print(digest.hexdigest())
"""


def batches(count, **options):
    data = RefinedWebDataModule(**{"block_size": 64, "batch_size": 7, "slot": 3, **options})
    return [batch["input_ids"] for batch in itertools.islice(data.train_dataloader(), count)]


@pytest.mark.parametrize(("tokenizer", "block_size"), list(GOLDEN))
def test_the_first_thousand_blocks_are_the_golden_ones(tokenizer, block_size):
    first = batches(100, tokenizer=tokenizer, block_size=block_size, batch_size=10, slot=0)
    digest = hashlib.sha256(torch.cat(first).numpy().astype("<u4").tobytes()).hexdigest()
    assert digest == GOLDEN[tokenizer, block_size]


def test_the_stream_is_the_same_for_any_number_of_workers():
    expected = batches(200)
    for workers in (1, 2, 4):
        assert all(map(torch.equal, expected, batches(200, num_workers=workers)))


def test_the_stream_is_the_same_in_other_processes_with_other_hash_seeds():
    digest = hashlib.sha256()
    for ids in batches(80):
        digest.update(ids.numpy().tobytes())
    for hash_seed, workers in (("1", "2"), ("2", "0")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", FIRST_BLOCKS, workers]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == digest.hexdigest(), done.stderr


def test_batches_run_over_the_ends_of_units_and_passes_without_a_gap(tmp_path, write_parquet):
    write_parquet(tmp_path / "a.parquet", [f"document number {i} of the folder" for i in range(30)], 5)
    data = RefinedWebDataModule(FolderCorpus(tmp_path), block_size=8, batch_size=3, n_slots=2, slot=1)
    addresses = []
    for _ in itertools.islice(data.train_dataloader(), 40):
        addresses += data.consumed_addresses
    expected = []
    for data_pass in range(20):
        assignment = data.assignment.at_pass(data_pass)
        for window in range(assignment.n_windows):
            (unit,) = assignment.units(window, 1)
            count = sum(address[0] == data_pass and address[2] == unit for address in map(as_tuple, addresses))
            expected += [BlockAddress(data_pass, window, unit, k) for k in range(count)]
    assert addresses == expected[: len(addresses)]
    assert len({address.data_pass for address in addresses}) >= 2


def as_tuple(address):
    return (address.data_pass, address.window, address.unit, address.k)


def test_two_slots_have_nothing_in_common_within_a_pass():
    corpus = EmbeddedCorpus()
    seen = {}
    for slot in range(8):
        data = RefinedWebDataModule(corpus, "gpt2", 512, batch_size=16, slot=slot, n_slots=8)
        for _ in data.train_dataloader():
            addresses = [address for address in data.consumed_addresses if address.data_pass == 0]
            for address in addresses:
                assert seen.setdefault((address.unit, address.k), slot) == slot
            if len(addresses) < 16:
                break
    assert len({unit for unit, _ in seen}) == 88


def test_the_stream_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batches(3)
    batches(3, num_workers=1)
    assert torch.equal(torch.rand(3), expected)


def test_blocks_longer_than_every_unit_are_refused_instead_of_searching_for_ever(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("short")
    data = RefinedWebDataModule(FolderCorpus(tmp_path, rows_per_unit=1), block_size=512)
    with pytest.raises(DataError, match="lower block_size"):
        next(iter(data.train_dataloader()))


def test_the_slot_comes_from_the_peer_id_where_none_is_given():
    class Strategy:
        peer_id = "12D3KooWExample"

    class Trainer:
        strategy = Strategy()
        training = False

    data = RefinedWebDataModule(block_size=64)
    data.trainer = Trainer()
    digest = hashlib.sha256(b"hivetrain slot 12D3KooWExample").digest()
    assert data.assignment.n_slots == 90
    assert data.train_dataloader().slot == int.from_bytes(digest, "little") % 90


def test_a_strategy_that_has_not_joined_is_refused_instead_of_reading_slot_0():
    class Trainer:
        strategy = type("Strategy", (), {"peer_id": None})()

    data = RefinedWebDataModule(block_size=64)
    data.trainer = Trainer()
    with pytest.raises(DataError, match="set slot, or join first"):
        data.train_dataloader()


def test_an_assignment_that_no_corpus_can_fill_is_refused_at_setup():
    with pytest.raises(DataError, match="set n_slots to at most 90"):
        RefinedWebDataModule(n_slots=256).setup("fit")
    with pytest.raises(DataError, match="block_size must be at least 1"):
        RefinedWebDataModule(block_size=0)
    assert isinstance(RefinedWebDataModule(units_per_window=45).assignment, DataAssignment)
