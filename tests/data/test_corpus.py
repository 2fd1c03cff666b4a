import json
import os

import pyarrow as pa
import pytest

from hivetrain.cli import main
from hivetrain.data import CorpusManifest, EmbeddedCorpus, FolderCorpus, RefinedWebDataModule
from hivetrain.data.corpus import ASSETS
from hivetrain.data.errors import ManifestError, UnitError
from hivetrain.data.folder import manifest_of_folder


def test_the_embedded_corpus_is_what_its_manifest_says():
    corpus = EmbeddedCorpus()
    rebuilt = manifest_of_folder(ASSETS / "corpus", repository="hivetrain/embedded", heldout_units=4)
    assert corpus.manifest == rebuilt
    sizes = [len(document.encode()) for unit in range(corpus.manifest.n_units) for document in corpus.read_unit(unit)]
    assert len(sizes) == 4315 + 150
    assert max(sizes) <= 4000
    assert 2400 < sum(sizes) / len(sizes) < 3000


def test_the_embedded_corpus_has_the_columns_of_refinedweb():
    schema = pa.parquet.read_schema(ASSETS / "corpus" / "train-00000-of-00004.parquet")
    assert schema.names == ["content", "url", "timestamp", "dump", "segment", "image_urls"]


def test_a_folder_mixes_parquet_jsonl_and_text_in_a_fixed_order(tmp_path, write_parquet):
    write_parquet(tmp_path / "b" / "x.parquet", ["p0", "p1", "p2"], 2)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": f"j{i}\nä"}) + "\n\n" for i in range(5)))
    for name in ("z.txt", "c/y.txt", "w.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    corpus = FolderCorpus(tmp_path, rows_per_unit=2)
    units = [corpus.read_unit(unit) for unit in range(corpus.manifest.n_units)]
    assert units == [
        ["j0\nä", "j1\nä"], ["j2\nä", "j3\nä"], ["j4\nä"], ["p0", "p1"], ["p2"],
        ["text of c/y.txt", "text of w.txt"], ["text of z.txt"],
    ]  # fmt: skip


def test_the_manifest_survives_its_file_and_any_change_changes_the_digest(tmp_path, write_parquet):
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], 2)
    manifest = manifest_of_folder(tmp_path)
    manifest.save(tmp_path / "m.json")
    assert CorpusManifest.load(tmp_path / "m.json") == manifest
    write_parquet(tmp_path / "a.parquet", ["a", "b", "C"], 2)
    digests = {
        manifest.digest,
        manifest_of_folder(tmp_path).digest,
        manifest_of_folder(tmp_path, heldout_units=1).digest,
        CorpusManifest("x", "0" * 40, manifest.files).digest,
        CorpusManifest("x", "1" * 40, manifest.files).digest,
    }
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(heldout_units=1), "says digest"),
        (lambda body: body["files"][0].update(rows=[2, 2]), "says digest"),
        (lambda body: body["files"][0].update(rows=[2, "1"]), "rows must be int"),
        (lambda body: body["files"][0].update(sha256="0" * 63), "64 hexadecimal"),
        (lambda body: body["files"][0].update(path="../a.parquet"), "must stay inside"),
        (lambda body: body["files"][0].update(path="/etc/a.parquet"), "must stay inside"),
        (lambda body: body.pop("files"), "files"),
        (lambda body: body.update(extra=1), "unknown key 'extra'"),
        (lambda body: body.update(heldout_units=2), "at least one must be left"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(tmp_path, write_parquet, change, message):
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], 2)
    manifest_of_folder(tmp_path).save(tmp_path / "m.json")
    body = json.loads((tmp_path / "m.json").read_text())
    change(body)
    (tmp_path / "m.json").write_text(json.dumps(body))
    with pytest.raises(ManifestError, match=message):
        CorpusManifest.load(tmp_path / "m.json")


def test_settings_that_contradict_the_manifest_are_refused(tmp_path, write_parquet):
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], 1)
    manifest_of_folder(tmp_path, heldout_units=1).save(tmp_path / "m.json")
    assert FolderCorpus(tmp_path, tmp_path / "m.json").manifest.n_train_units == 2
    assert FolderCorpus(tmp_path, tmp_path / "m.json", heldout_units=1).manifest.n_train_units == 2
    with pytest.raises(ManifestError, match="heldout_units is 2, but the manifest of .* says 1"):
        _ = FolderCorpus(tmp_path, tmp_path / "m.json", heldout_units=2).manifest
    with pytest.raises(ManifestError, match="content_key is 'text'"):
        _ = FolderCorpus(tmp_path, tmp_path / "m.json", content_key="text").manifest


def test_files_that_differ_from_the_manifest_are_refused_before_they_are_used(tmp_path, write_parquet):
    path = write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], 2)
    manifest_of_folder(tmp_path).save(tmp_path / "m.json")
    corpus = FolderCorpus(tmp_path, manifest=tmp_path / "m.json")
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnitError, match=r"unit 1 .*a\.parquet, row group 1.*sha256 differs"):
        corpus.read_unit(1)
    path.unlink()
    with pytest.raises(UnitError, match=r"a\.parquet.*No such file"):
        FolderCorpus(tmp_path, manifest=tmp_path / "m.json").read_unit(0)


def bad_parquet(tmp_path, write_parquet, kind):
    """A folder whose second row group of bad.parquet has something wrong with it."""
    good = "a good document"
    path = tmp_path / "bad.parquet"
    if kind == "empty":
        return write_parquet(path, [good, good, good, ""], 2)
    if kind == "null":
        return write_parquet(path, [good, good, None, good], 2)
    if kind == "huge":
        return write_parquet(path, [good, good, "word " * 10_000_000], 2)
    if kind == "utf-8":
        texts = pa.array([good.encode()] * 3 + [b"\xff\xfe broken"], pa.binary()).view(pa.string())
        return write_parquet(path, texts, 2)
    write_parquet(path, [f"{i} incompressible {os.urandom(800).hex()}" for i in range(4)], 2)
    footer = pa.parquet.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    start = footer.data_page_offset
    content[start : start + footer.total_compressed_size // 2] = b"\x00" * (footer.total_compressed_size // 2)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("corrupt", "unit 1"),
        ("empty", "row 1 has no text"),
        ("null", "row 0 has no text"),
        ("huge", "row 0 has 50000000 characters"),
        ("utf-8", "utf-8|UTF8"),
    ],
)
def test_a_bad_row_group_is_an_error_that_names_file_and_row_group(tmp_path, write_parquet, kind, message):
    bad_parquet(tmp_path, write_parquet, kind)
    corpus = FolderCorpus(tmp_path)
    with pytest.raises(UnitError, match=message) as caught:
        corpus.read_unit(1)
    assert (caught.value.unit, caught.value.row_group) == (1, 1)
    assert "bad.parquet, row group 1" in str(caught.value)
    if kind != "corrupt":
        assert len(corpus.read_unit(0)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_unit_stops_the_stream_whatever_the_number_of_workers(tmp_path, write_parquet, workers):
    bad_parquet(tmp_path, write_parquet, "empty")
    data = RefinedWebDataModule(FolderCorpus(tmp_path), block_size=2, batch_size=1, n_slots=1, num_workers=workers)
    with pytest.raises(UnitError, match=r"bad\.parquet, row group 1\): row 1 has no text"):
        for _ in data.train_dataloader():
            pass


def test_a_missing_or_wrong_column_is_named(tmp_path, write_parquet):
    write_parquet(tmp_path / "a.parquet", ["a"], 1, key="text")
    with pytest.raises(ManifestError, match=r"no column .content. but image_urls, text, url. Set content_key"):
        _ = FolderCorpus(tmp_path).manifest
    assert FolderCorpus(tmp_path, content_key="text").read_unit(0) == ["a"]
    write_parquet(tmp_path / "a.parquet", [1], 1, kind=pa.int64())
    with pytest.raises(ManifestError, match="holds int64, not text"):
        _ = FolderCorpus(tmp_path).manifest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "a\xff"}', "not JSON in UTF-8"),
        (b'{"content": "a"', "not JSON in UTF-8"),
        (b'{"text": "a"}', "no key 'content'"),
        (b'{"content": 5}', "holds int, not text"),
        (b'{"content": null}', "has no text"),
        (b"[]", "no key 'content'"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "good"}\n' * 3 + line + b"\n")
    with pytest.raises(UnitError, match=rf"a\.jsonl, row group 1\): row 1.*{message}"):
        FolderCorpus(tmp_path, rows_per_unit=2).read_unit(1)


def test_bad_files_are_named_before_training(tmp_path):
    with pytest.raises(ManifestError, match=r"no \.parquet, \.jsonl, \.txt file"):
        _ = FolderCorpus(tmp_path).manifest
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UnitError, match=r"a\.txt, row group 0\): .*utf-8"):
        FolderCorpus(tmp_path).read_unit(0)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    with pytest.raises(ManifestError, match=r"b\.parquet: not a readable parquet file"):
        _ = FolderCorpus(tmp_path).manifest


def test_the_command_resumes_where_it_was_cut_off(tmp_path, write_parquet, capsys, monkeypatch):
    for name in "abc":
        write_parquet(tmp_path / "data" / f"{name}.parquet", [name] * 3, 2)
    broken = tmp_path / "data" / "c.parquet"
    good = broken.read_bytes()
    broken.write_bytes(b"torn")
    out = tmp_path / "m.json"
    command = ["manifest", str(tmp_path / "data"), "--out", str(out)]
    assert main(command) == 2
    assert "c.parquet: not a readable parquet file" in capsys.readouterr().err
    journal = tmp_path / "m.json.journal"
    assert len(journal.read_text().splitlines()) == 3
    journal.write_text(journal.read_text() + '["d", {"path')  # as a kill leaves it
    broken.write_bytes(good)
    measured = []
    import hivetrain.data.folder as folder

    hash_file = folder.file_sha256
    monkeypatch.setattr(folder, "file_sha256", lambda path: measured.append(path.name) or hash_file(path))
    assert main(command) == 0
    assert measured == ["c.parquet"]
    assert CorpusManifest.load(out) == manifest_of_folder(tmp_path / "data")
    assert not journal.exists()


def test_the_command_trains_a_tokenizer_that_the_data_module_takes(tmp_path, write_parquet, documents, capsys):
    write_parquet(tmp_path / "data" / "a.parquet", documents[:60], 20)
    out = tmp_path / "tokenizer.json"
    assert main(["tokenizer", "train", str(tmp_path / "data"), "--vocabulary-size", "700", "--out", str(out)]) == 0
    assert "3 of 3 units" in capsys.readouterr().err
    data = RefinedWebDataModule(FolderCorpus(tmp_path / "data"), tokenizer=str(out), block_size=16, batch_size=2)
    assert data.vocabulary_size == 700
    assert next(iter(data.train_dataloader()))["input_ids"].max() < 700
    assert main(["tokenizer", "train", str(tmp_path / "data"), "--vocabulary-size", "9", "--out", str(out)]) == 2
