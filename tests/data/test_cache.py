import sqlite3
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from hivetrain.data import EmbeddedCorpus, RefinedWebDataModule, load_encoder
from hivetrain.data.cache import TokenCache
from hivetrain.data.errors import DataError
from hivetrain.data.stream import UnitBlocks


def tokens(number, length=1000):
    return np.full(length, number, dtype=np.uint16)


def sizes(cache):
    with closing(sqlite3.connect(cache.path)) as database:
        return database.execute("SELECT unit, size FROM units ORDER BY unit").fetchall()


def test_what_was_put_comes_back_in_another_process_or_object(tmp_path):
    TokenCache(tmp_path, 10_000).put("data", 7, np.arange(500, dtype=np.uint32))
    found = TokenCache(tmp_path, 10_000).get("data", 7)
    assert found.dtype == np.uint32
    assert found.tolist() == list(range(500))
    assert TokenCache(tmp_path, 10_000).get("data", 8) is None
    assert TokenCache(tmp_path, 10_000).get("other", 7) is None


def test_the_limit_holds_and_the_units_not_used_for_longest_go_first(tmp_path):
    cache = TokenCache(tmp_path, 6000)
    for unit in range(3):
        cache.put("data", unit, tokens(unit))
    assert cache.get("data", 0) is not None
    cache.put("data", 3, tokens(3))
    assert [unit for unit, _ in sizes(cache)] == [0, 2, 3]
    cache.put("data", 4, tokens(4, 2500))
    assert sizes(cache) == [(4, 5000)]
    cache.put("data", 5, tokens(5, 4000))
    assert sizes(cache) == [(4, 5000)]


def test_a_damaged_unit_is_tokenized_again_and_a_damaged_file_is_an_error(tmp_path, caplog):
    cache = TokenCache(tmp_path, 10_000)
    cache.put("data", 1, tokens(1))
    with closing(sqlite3.connect(cache.path)) as database, database:
        database.execute("UPDATE units SET tokens=?", (tokens(2).tobytes(),))
    assert cache.get("data", 1) is None
    assert "unit 1 is damaged" in caplog.text
    cache.close()
    cache.path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(DataError, match="Delete it, or choose another cache_dir"):
        cache.get("data", 1)


def test_the_stream_from_the_cache_is_the_same_for_any_block_size_and_reads_no_corpus(tmp_path):
    def first(block_size, workers=0, cached=True):
        options = {"cache_dir": str(tmp_path)} if cached else {}
        data = RefinedWebDataModule(block_size=block_size, batch_size=50, slot=1, num_workers=workers, **options)
        batches = [batch["input_ids"] for batch, _ in zip(data.train_dataloader(), range(12), strict=False)]
        data.teardown("fit")
        return torch.cat(batches)

    expected = first(128, cached=False)
    assert torch.equal(first(128, workers=2), expected)
    assert torch.equal(first(128), expected)
    assert torch.equal(first(64), first(64, cached=False))

    class NoCorpus(EmbeddedCorpus):
        def read_documents(self, unit):
            raise AssertionError("the cache was not used")

    encoder, cache = load_encoder("embedded"), TokenCache(tmp_path, 1 << 30)
    (unit,) = RefinedWebDataModule(block_size=128).assignment.units(0, 1)
    blocks = UnitBlocks(NoCorpus(), encoder, 128, cache)[unit]
    assert torch.equal(blocks[:50].to(torch.int64), expected[:50])


def test_a_cached_unit_is_read_at_least_ten_times_faster_than_it_is_tokenized(tmp_path):
    def seconds(units):
        begin = time.process_time()
        for unit in range(20):
            assert len(units[unit]) > 0
        return time.process_time() - begin

    units = UnitBlocks(EmbeddedCorpus(), load_encoder("embedded"), 512, TokenCache(tmp_path, 1 << 30))
    uncached = seconds(units)
    assert seconds(units) * 10 < uncached
