import datetime
import json
import logging
import os
import subprocess
import sys
import time
from email.utils import format_datetime

import pytest
from hub_server import COMMIT, REPOSITORY, serving
from huggingface_hub import constants

from hivetrain.data import CorpusManifest, FolderCorpus, HubCorpus
from hivetrain.data.download import Downloader, Retry
from hivetrain.data.errors import HubError, ManifestError
from hivetrain.data.folder import manifest_of_folder
from hivetrain.data.hub_manifest import Pacer


@pytest.fixture
def hub(tmp_path, documents, write_parquet, monkeypatch):
    """A hub with one data set of two parquet files, four units each, and a manifest of it in the folder."""
    folder = tmp_path / "repository"
    for number in range(2):
        write_parquet(folder / f"data/train-{number}.parquet", documents[number * 80 : number * 80 + 80], 20)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
    with serving(files) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files = manifest_of_folder(folder).files
        CorpusManifest(REPOSITORY, COMMIT, files).save(tmp_path / "manifest.json")
        server.folder = folder
        server.manifest_path = tmp_path / "manifest.json"
        yield server


def corpus(hub, **retry):
    made = HubCorpus(REPOSITORY, COMMIT, hub.manifest_path)
    made.downloader = Downloader(Retry(**{"deadline_s": 10, "read_timeout_s": 0.3, "first_wait_s": 0.05, **retry}))
    return made


def test_units_of_the_hub_equal_those_of_the_same_files_in_a_folder(hub):
    ours, local = corpus(hub), FolderCorpus(hub.folder)
    for unit in range(8):
        assert ours.read_unit(unit) == local.read_unit(unit)


def test_only_the_text_of_one_row_group_travels_and_the_footer_only_once(hub):
    ours = corpus(hub)
    ours.read_unit(0)
    first = len(hub.data_requests())
    ours.read_unit(1)
    assert len(hub.data_requests()) == first + 1
    assert first <= 3


@pytest.mark.parametrize(
    "faults",
    [[(429, 0)], [503, 500], ["silence"], ["truncate"], ["reset", 502], [(503, 1), "truncate", "silence", 504]],
    ids=lambda faults: ",".join(map(str, faults)),
)
def test_a_passing_fault_is_retried_with_one_log_line_each(hub, faults, caplog):
    hub.faults = list(faults)
    with caplog.at_level(logging.WARNING):
        documents = corpus(hub).read_unit(5)
    assert documents == FolderCorpus(hub.folder).read_unit(5)
    lines = [record.message for record in caplog.records if record.name == "hivetrain.data.download"]
    assert len(lines) == len(faults)
    assert all("unit 5" in line and hub.url in line for line in lines)


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(hub):
    waits = []
    for value in (7, format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=7), usegmt=True)):
        hub.faults = [(429, value)]
        ours = corpus(hub)
        ours.downloader.sleep = waits.append
        ours.read_unit(0)
    assert waits[0] == 7
    assert 5 < waits[1] <= 7


@pytest.mark.parametrize("fault", [(429, 0), 503, "silence", "truncate", "reset"], ids=str)
def test_a_lasting_fault_ends_at_the_deadline_with_an_error_that_names_unit_and_url(hub, fault):
    hub.forever = fault
    begin = time.monotonic()
    with pytest.raises(HubError, match="gave up after") as caught:
        corpus(hub, deadline_s=1.0, longest_wait_s=0.2, first_wait_s=0.1).read_unit(6)
    assert time.monotonic() - begin < 2.0
    assert caught.value.unit == 6
    assert caught.value.row_group == 2
    assert caught.value.file == f"{hub.url}/datasets/{REPOSITORY}/resolve/{COMMIT}/data/train-1.parquet"
    assert caught.value.file in str(caught.value)


def test_a_server_that_drips_bytes_cannot_outlast_the_deadline(hub):
    hub.forever = "drip"
    begin = time.monotonic()
    with pytest.raises(HubError, match="in time"):
        corpus(hub, deadline_s=1.0).read_unit(0)
    assert time.monotonic() - begin < 2.0


def test_a_wait_beyond_the_deadline_is_not_waited_for(hub):
    hub.forever = (429, 3600)
    begin = time.monotonic()
    with pytest.raises(HubError, match="asks to wait 3600 s"):
        corpus(hub).read_unit(0)
    assert time.monotonic() - begin < 1.0


@pytest.mark.parametrize(("fault", "hint"), [(404, "404"), (403, "ask for access"), (401, "log in")])
def test_a_refusal_is_final(hub, fault, hint):
    hub.forever = fault
    with pytest.raises(HubError, match=hint):
        corpus(hub).read_unit(0)
    assert len(hub.data_requests()) == 1


def test_a_server_without_ranges_is_refused_before_the_whole_file_is_read(hub):
    hub.forever = "no range"
    with pytest.raises(HubError, match="ignores Range"):
        corpus(hub).read_unit(0)


def test_other_bytes_under_the_same_name_are_refused(hub, documents, write_parquet):
    same_size = bytearray(hub.files["data/train-0.parquet"])
    same_size[100] ^= 1
    hub.files["data/train-0.parquet"] = bytes(same_size)
    with pytest.raises(HubError, match="not the file in the manifest: its sha256"):
        corpus(hub).read_unit(0)
    hub.files["data/train-0.parquet"] = write_parquet(hub.folder / "x.parquet", documents[200:280], 20).read_bytes()
    with pytest.raises(HubError, match="not the file in the manifest"):
        corpus(hub).read_unit(0)


def test_an_unpinned_revision_is_refused():
    for revision in ("main", "", "v1.0", COMMIT[:12], COMMIT.upper()):
        with pytest.raises(ManifestError, match="not pinned"):
            HubCorpus(REPOSITORY, revision)
        if revision:
            with pytest.raises(ManifestError, match="not pinned"):
                CorpusManifest(REPOSITORY, revision, ())


def test_a_manifest_of_another_revision_is_refused(hub):
    with pytest.raises(ManifestError, match="describes someone/web"):
        _ = HubCorpus(REPOSITORY, "f" * 40, hub.manifest_path).manifest


def run_manifest(hub, tmp_path, *arguments):
    return run(hub, tmp_path, "-m", "hivetrain.cli", "manifest", REPOSITORY, *arguments)


def run(hub, tmp_path, *arguments):
    """In a process of its own, for the hub's libraries read their address once."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_the_command_builds_the_manifest_of_a_data_set_on_the_hub(hub, tmp_path):
    hub.files["README.md"] = b"---\nlicense: mit\n---\n"
    done = run_manifest(hub, tmp_path, "--revision", COMMIT, "--out", "m.json", "--requests-per-minute", "6000")
    assert done.returncode == 0, done.stderr
    assert CorpusManifest.load(tmp_path / "m.json") == CorpusManifest.load(hub.manifest_path)
    assert "8 units" in done.stdout
    assert "2 of 2 files" in done.stderr
    assert not (tmp_path / "m.json.journal").exists()


def test_a_data_set_without_parquet_is_streamed_in_units_of_fixed_rows_from_a_verified_copy(hub, tmp_path, documents):
    hub.files.clear()
    hub.files["web.jsonl"] = "".join(json.dumps({"content": text}) + "\n" for text in documents[:45]).encode()
    done = run_manifest(hub, tmp_path, "--revision", COMMIT, "--out", "m.json", "--rows-per-unit", "20")
    assert done.returncode == 0, done.stderr
    ours = HubCorpus(REPOSITORY, COMMIT, tmp_path / "m.json", download_dir=tmp_path / "downloads")
    assert ours.manifest.files[0].rows == (20, 20, 5)
    assert ours.read_unit(1) == documents[20:40]
    before = len(hub.data_requests())
    assert ours.read_unit(2) == documents[40:45]
    assert len(hub.data_requests()) == before
    (copy,) = (tmp_path / "downloads").iterdir()
    copy.unlink()
    hub.forever = 503
    ours.downloader = Downloader(Retry(deadline_s=0.5, first_wait_s=0.05))
    with pytest.raises(HubError, match=r"unit 0 .*web\.jsonl, row group 0\): gave up"):
        ours.read_unit(0)


def test_the_command_resumes_after_the_hub_failed(hub, tmp_path):
    broken = hub.files["data/train-1.parquet"]
    hub.files["data/train-1.parquet"] = b"PAR1" + b"\x00" * 100 + b"PAR1"
    arguments = ["--revision", COMMIT, "--out", "m.json", "--requests-per-minute", "6000"]
    done = run_manifest(hub, tmp_path, *arguments)
    assert done.returncode == 2
    assert "train-1.parquet: not a readable file" in done.stderr
    assert "Traceback" not in done.stderr
    hub.files["data/train-1.parquet"] = broken
    hub.requests.clear()
    done = run_manifest(hub, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.rpartition("/")[2] for path in hub.data_requests()} == {"train-1.parquet"}
    assert CorpusManifest.load(tmp_path / "m.json") == CorpusManifest.load(hub.manifest_path)


def test_what_cannot_be_resolved_is_one_clear_line(hub, tmp_path):
    cases = {
        "no split 'test', but train": [REPOSITORY, "--revision", COMMIT, "--split", "test"],
        "no column 'body'": [REPOSITORY, "--revision", COMMIT, "--content-key", "body"],
        f"{REPOSITORY} at {'f' * 40}: ": [REPOSITORY, "--revision", "f" * 40],
        "'main' of someone/web is not pinned": [REPOSITORY, "--revision", "main"],
    }
    calls = f"from hivetrain.cli import main\nfor case in {list(cases.values())}: print(main(['manifest', *case]))"
    done = run(hub, tmp_path, "-c", calls)
    assert done.stdout.split() == ["2"] * len(cases), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hivetrain: error: ")]
    assert len(lines) == len(cases)
    assert all(message in line for message, line in zip(cases, lines, strict=True))
    assert "Traceback" not in done.stderr


def test_requests_are_paced():
    now, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    pace = Pacer(120, sleep=sleep, clock=lambda: now[0])
    for _ in range(241):
        pace()
    assert now[0] == pytest.approx(120)
    assert max(waits) <= 0.5 + 1e-9
