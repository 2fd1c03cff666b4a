import json
import subprocess
import sys
import time

PARTIAL = """
import itertools, sys, time
from hivetrain.data import Cursor, DataAssignment, EmbeddedCorpus, load_encoder
from hivetrain.data.stream import SlotStream, UnitBlocks
corpus, encoder = EmbeddedCorpus(), load_encoder("gpt2")
stream = SlotStream(
    UnitBlocks(corpus, encoder, 128), DataAssignment("x", 90, n_slots=3), 0, Cursor(), 4, int(sys.argv[1]), dict, True
)
stream.collate = lambda ids: {"input_ids": ids}
iterator = iter(stream)
for _ in range(5):
    next(iterator)
print(time.time(), flush=True)
"""

MEMORY = """
import gc, itertools, json, os, psutil, sys
from hivetrain.data import Cursor, DataAssignment, EmbeddedCorpus, load_encoder
from hivetrain.data.stream import SlotStream, UnitBlocks
corpus, encoder = EmbeddedCorpus(), load_encoder(sys.argv[1])
units = UnitBlocks(corpus, encoder, 128)
stream = SlotStream(units, DataAssignment("x", 90, n_slots=1), 0, Cursor(), 16, 0, lambda ids: ids, True)
seen, rss = set(), {}
for _ in stream:
    seen |= {address.unit for address in stream.addresses}
    if len(seen) in (6, 51) and len(seen) not in rss:
        gc.collect()
        rss[len(seen)] = psutil.Process().memory_info().rss
    if len(seen) > 50:
        break
print(json.dumps(rss))
"""


def test_a_process_ends_within_five_seconds_after_a_partial_iteration():
    for workers in ("0", "2"):
        command = [sys.executable, "-c", PARTIAL, workers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        ended = time.time()
        assert done.returncode == 0, done.stderr
        assert ended - float(done.stdout) < 5


def test_memory_after_fifty_units_is_within_a_tenth_of_that_after_five():
    for tokenizer in ("gpt2", "embedded"):
        done = subprocess.run([sys.executable, "-c", MEMORY, tokenizer], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        after_5, after_50 = json.loads(done.stdout).values()
        assert after_50 <= after_5 * 1.1, (tokenizer, after_5, after_50)
