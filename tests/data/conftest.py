import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hivetrain.data import EmbeddedCorpus


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch):
    """Fails whatever would leave this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            pytest.fail(f"a connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def documents():
    """Two thousand real documents."""
    corpus = EmbeddedCorpus()
    return [document for unit in range(42) for document in corpus.read_unit(unit)][:2000]


@pytest.fixture
def write_parquet():
    """Writes documents in RefinedWeb's main columns."""

    def write(path, documents, rows_per_group, key="content", kind=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {
            "image_urls": pa.array([[["u", "v"]] for _ in documents], pa.list_(pa.list_(pa.string()))),
            key: pa.array(documents, kind or pa.string()),
            "url": [f"https://example.org/{i}" for i in range(len(documents))],
        }
        pq.write_table(pa.table(columns), path, row_group_size=rows_per_group, compression="zstd")
        return path

    return write
