"""Tokens per CPU-second of the data stream, next to the encoders alone and to ``datasets`` streaming.

    python benchmarks/data.py

Everything is measured in one process and one run, round after round, on the embedded corpus rewritten as parquet with
row groups of 500; GPT-2's vocabulary, blocks of 512. Rates are tokens that come out, per second of CPU time. A ratio is
the median of those of the single rounds, so that a machine that is busy with other things for a while does not bend it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread for everybody; read when tokenizers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import ByteLevelBPETokenizer

from hivetrain.data import (
    Cursor,
    DataAssignment,
    EmbeddedCorpus,
    Encoder,
    FolderCorpus,
    TokenizersEncoder,
    load_encoder,
)
from hivetrain.data.cache import TokenCache
from hivetrain.data.corpus import ASSETS
from hivetrain.data.stream import SlotStream, UnitBlocks

BLOCK_SIZE, BATCH_SIZE, ROWS = 512, 8, 500
RATIOS = [
    ("ours / encoder alone, tiktoken", "our stream, tiktoken", "tiktoken alone", 0.75),
    ("ours / encoder alone, tokenizers", "our stream, tokenizers", "tokenizers alone", 0.75),
    ("ours / datasets streaming, each as it comes", "our stream, tiktoken", "datasets streaming, tokenizers", 3.0),
    ("ours / datasets streaming, both tiktoken", "our stream, tiktoken", "datasets streaming, tiktoken", ""),
    ("ours / datasets streaming, both tokenizers", "our stream, tokenizers", "datasets streaming, tokenizers", ""),
    ("cached second pass / first pass", "our stream, cached second pass", "our stream, tiktoken", 10.0),
]
Run = Callable[[], int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is printed (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        runs = build(Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(args.rounds + 1):
            for name, run in runs.items():
                begin = time.process_time()
                tokens = run()
                if number:  # the first round warms up
                    rates[name].append(tokens / (time.process_time() - begin))
            print(f"round {number} of {args.rounds}", file=sys.stderr)
    report(rates)


def build(folder: Path) -> dict[str, Run]:
    documents = [text for unit in range(90) for text in EmbeddedCorpus().read_unit(unit)]
    documents = documents[: len(documents) // ROWS * ROWS]
    (folder / "corpus").mkdir()
    parquet = folder / "corpus" / "train.parquet"
    columns = {"content": documents, "url": [f"https://example.org/{i}" for i in range(len(documents))]}
    pq.write_table(pa.table(columns), parquet, row_group_size=ROWS, compression="zstd")
    tiktoken, tokenizers = load_encoder("gpt2"), gpt2_by_tokenizers(folder)
    corpus = FolderCorpus(folder / "corpus")
    return {
        "tiktoken alone": alone(documents, tiktoken),
        "tokenizers alone": alone(documents, tokenizers),
        "our stream, tiktoken": stream(corpus, tiktoken),
        "our stream, tokenizers": stream(corpus, tokenizers),
        "our stream, cached second pass": stream(corpus, tiktoken, TokenCache(folder / "cache", 1 << 30)),
        "datasets streaming, tiktoken": datasets_streaming(parquet, tiktoken),
        "datasets streaming, tokenizers": datasets_streaming(parquet, tokenizers),
    }


def gpt2_by_tokenizers(folder: Path) -> Encoder:
    """GPT-2's vocabulary in the other library."""
    files = ASSETS / "tokenizers" / "gpt2"
    tokenizer = ByteLevelBPETokenizer(str(files / "encoder.json"), str(files / "vocab.bpe"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenizersEncoder(folder / "tokenizer.json")


def alone(documents: list[str], encoder: Encoder) -> Run:
    """Only the encoder, on text in memory, as many documents at a time as a unit has."""
    parts = [documents[start : start + ROWS] for start in range(0, len(documents), ROWS)]
    return lambda: sum(sum(map(len, encoder.encode(part))) for part in parts)


def stream(corpus: FolderCorpus, encoder: Encoder, cache: TokenCache | None = None) -> Run:
    """One pass of our stream over all units."""
    units = UnitBlocks(corpus, encoder, BLOCK_SIZE, cache)
    n_units = corpus.manifest.n_units
    batches = sum(len(units[unit]) for unit in range(n_units)) // BATCH_SIZE
    assignment = DataAssignment("benchmark", n_units, n_slots=1)

    def run() -> int:
        batch = {"input_ids": torch.empty(0)}
        slot = SlotStream(units, assignment, 0, Cursor(), BATCH_SIZE, 0, lambda ids: {"input_ids": ids}, True)
        for batch in islice(slot, batches):
            assert batch["input_ids"].shape == (BATCH_SIZE, BLOCK_SIZE)
        return batches * batch["input_ids"].numel()

    return run


def datasets_streaming(parquet: Path, encoder: Encoder) -> Run:
    """The usual recipe: stream, tokenize and group into blocks in a batched map, iterate in batches."""

    def pack(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens: list[int] = []
        for ids in encoder.encode(rows["content"]):
            tokens += [*ids.tolist(), encoder.eos_id]
        end = len(tokens) // BLOCK_SIZE * BLOCK_SIZE
        return {"input_ids": [tokens[start : start + BLOCK_SIZE] for start in range(0, end, BLOCK_SIZE)]}

    def run() -> int:
        rows = datasets.load_dataset("parquet", data_files=str(parquet), split="train", streaming=True)
        blocks = rows.map(pack, batched=True, batch_size=ROWS, remove_columns=["content", "url"])
        return sum(torch.tensor(batch["input_ids"]).numel() for batch in blocks.iter(BATCH_SIZE))

    return run


def report(rates: dict[str, list[float]]) -> None:
    print("| what | tokens / CPU-s |")
    print("|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values) / 1e6:.2f} M |")
    print()
    print("| ratio | measured | at least |")
    print("|---|---|---|")
    for name, above, below, least in RATIOS:
        ratio = statistics.median(a / b for a, b in zip(rates[above], rates[below], strict=True))
        print(f"| {name} | {ratio:.2f} | {least} |")


if __name__ == "__main__":
    main()
