import itertools

import pytest
import torch

from hivetrain.data import FolderCorpus, RefinedWebDataModule, SlotReader
from hivetrain.data.errors import AssignmentError, DataError, UnitError


@pytest.fixture
def folder(tmp_path, write_parquet):
    """Six units of a few blocks each, one of them too short for a block of 12 tokens."""
    rows = [f"document number {i} of the folder" for i in range(30)]
    rows[10:15] = ["a"] * 5
    write_parquet(tmp_path / "a.parquet", rows, 5)
    return FolderCorpus(tmp_path)


def data_module(folder, **options):
    return RefinedWebDataModule(folder, **{"block_size": 12, "batch_size": 3, "n_slots": 2, "slot": 1, **options})


def walk(data, count):
    """The first batches of the stream, and the place of every block in them as a miner would state it."""
    batches, places = [], []
    for batch in itertools.islice(data.train_dataloader(), count):
        batches.append(batch)
        for address in data.consumed_addresses:
            units = data.assignment.at_pass(address.data_pass).units(address.window, data.slot)
            places.append((address.data_pass, address.window, units.index(address.unit), address.k))
    return batches, places


@pytest.mark.parametrize("units_per_window", [1, 3])
def test_a_reader_finds_every_batch_of_a_stream_from_any_place_before_it(folder, units_per_window):
    data = data_module(folder, units_per_window=units_per_window)
    batches, places = walk(data, 40)
    assert places[-1][0] >= 2, "the stream runs over the ends of passes"
    assert units_per_window == 1 or {place[2] for place in places} == {0, 1, 2}
    reader = SlotReader.of(data)
    for start in (0, 1, 8, 29, 60):
        for i, batch in enumerate(batches):
            if 3 * i >= start:
                found, place = reader.batch(1, places[start], 3 * i - start, 3)
                assert torch.equal(found["input_ids"], batch["input_ids"])
                assert place == places[3 * i]
    assert [reader.position_at(1, places[2], offset) for offset in range(100)] == places[2:102]


def test_batches_are_collated_as_for_training(folder):
    data = data_module(folder, isolate_documents=True)
    (batch,), (place, *_) = walk(data, 1)
    found, _ = SlotReader.of(data).batch(1, place, 0, 3)
    assert found.keys() == batch.keys() == {"input_ids", "position_ids", "attention_mask"}
    assert all(torch.equal(found[name], batch[name]) for name in batch)


def test_several_looks_read_a_unit_once(folder, monkeypatch):
    data = data_module(folder)
    reads = []
    read_unit = folder.read_unit
    monkeypatch.setattr(folder, "read_unit", lambda unit: reads.append(unit) or read_unit(unit))
    reader = SlotReader.of(data, keep_units=8)
    for offset in range(40):
        reader.batch(0, (0, 0, 0, 0), offset, 3)
    assert len(reads) == len(set(reads))


def test_the_way_to_a_far_batch_holds_few_units_in_memory(folder, monkeypatch):
    reader = SlotReader.of(data_module(folder), keep_units=1)
    expected = SlotReader.of(data_module(folder)).batch(1, (0, 0, 0, 0), 50, 3)
    found = reader.batch(1, (0, 0, 0, 0), 50, 3)
    assert torch.equal(found[0]["input_ids"], expected[0]["input_ids"])
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    ("slot", "first", "offset", "count"),
    [
        (2, (0, 0, 0, 0), 0, 3),
        (-1, (0, 0, 0, 0), 0, 3),
        (1, (0, 99, 0, 0), 0, 3),
        (1, (0, -1, 0, 0), 0, 3),
        (1, (0, 0, 1, 0), 0, 3),
        (1, (0, 0, -1, 0), 0, 3),
        (1, (0, 0, 0, 10_000), 0, 3),
        (1, (0, 0, 0, -1), 0, 3),
        (1, (-1, 0, 0, 0), 0, 3),
        (1, (1 << 62, 0, 0, 0), 0, 3),
        (1, (0, 0, 0, 0), -1, 3),
        (1, (0, 0, 0, 0), 0, 0),
    ],
)
def test_a_place_that_no_stream_has_is_refused(folder, slot, first, offset, count):
    reader = SlotReader.of(data_module(folder))
    reader.batch(1, (0, 0, 0, 0), 0, 3)
    with pytest.raises(AssignmentError):
        reader.batch(slot, first, offset, count)


def test_a_place_one_past_the_last_block_of_a_unit_has_another_name(folder):
    data = data_module(folder)
    _, places = walk(data, 10)
    end = next(i for i, place in enumerate(places) if place[3] == 0 and i)
    before = places[end - 1]
    with pytest.raises(AssignmentError, match="has no block"):
        SlotReader.of(data).position_at(1, (*before[:3], before[3] + 1), 0)


def test_a_number_past_the_end_of_a_unit_is_carried_into_the_next_ones(folder):
    data = data_module(folder)
    _, places = walk(data, 20)
    reader = SlotReader.of(data, max_offset=100)
    for start in range(20):
        *unit, block = places[start]
        assert [reader.carry(1, (*unit, block + n)) for n in range(40)] == places[start : start + 40]
    for nowhere in ((0, 0, 0, 1000), (0, 0, 0, 2**53 - 1), (0, 99, 0, 0), (0, 0, 7, 0), (0, 0, 0, -1)):
        with pytest.raises(AssignmentError):
            reader.carry(1, nowhere)


def test_no_record_can_make_a_reader_read_for_ever(folder):
    reader = SlotReader.of(data_module(folder), max_offset=100)
    reader.batch(1, (0, 0, 0, 0), 97, 3)
    with pytest.raises(DataError, match="out of reach") as raised:
        reader.batch(1, (0, 0, 0, 0), 98, 3)
    assert not isinstance(raised.value, AssignmentError), "not the miner's fault"
    with pytest.raises(DataError, match="no unit holds a full block"):
        SlotReader.of(data_module(folder, block_size=100_000)).position_at(1, (0, 0, 0, 0), 0)


def test_a_unit_that_cannot_be_read_is_an_error_each_time_and_is_read_again(folder, monkeypatch):
    data = data_module(folder)
    reader = SlotReader.of(data)

    def broken(unit):
        raise UnitError("gone", unit=unit, file="a.parquet", row_group=unit)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "read_unit", broken)
        for _ in range(2):
            with pytest.raises(UnitError, match="gone"):
                reader.batch(1, (0, 0, 0, 0), 0, 3)
    reader.batch(1, (0, 0, 0, 0), 0, 3)
