"""A checkpoint is whole or not there: on a disk that is full, and when the program is killed while it writes."""

import logging
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_callbacks import model, silent, trainer
from toy_data import CountingData

from hivetrain.callbacks import StopAtSwarmEpoch, SwarmCheckpoint
from hivetrain.callbacks.checkpoint import CheckpointError
from hivetrain.callbacks.checkpoint_file import WholeFileIO
from hivetrain.errors import UserError
from hivetrain.model import CausalLM


@contextmanager
def room_for(size_bytes):
    """No file of this process can grow beyond ``size_bytes``, which the kernel reports as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_checkpoint_and_training_goes_on(tmp_path, caplog):
    learner = model()
    first = SwarmCheckpoint(str(tmp_path), every_n_epochs=1)
    trainer(first, StopAtSwarmEpoch(1), silent()).fit(learner, CountingData())
    before = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "epoch-00000001.ckpt").rename(tmp_path / "epoch-00000000.ckpt")
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("epoch-00000000.ckpt")
    run = trainer(SwarmCheckpoint(str(tmp_path), every_n_epochs=1), StopAtSwarmEpoch(3), silent())
    with room_for(20_000), caplog.at_level(logging.ERROR), pytest.raises(UserError, match="Free some space there"):
        run.fit(model(), CountingData())
    assert run.strategy.swarm_epoch == 3
    assert caplog.text.count("File too large. Free some space there (the last good one is epoch-00000000.ckpt)") == 3
    assert "training goes on" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00000000.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_what_the_disk_said_is_raised_and_not_what_torch_makes_of_it(tmp_path):
    target = tmp_path / "a.ckpt"
    target.write_bytes(b"the last one")
    with room_for(20_000), pytest.raises(OSError, match="File too large"):
        WholeFileIO().save_checkpoint({"weights": torch.zeros(100_000)}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert target.read_bytes() == b"the last one"
    WholeFileIO().save_checkpoint({"weights": torch.arange(5)}, target)
    assert torch.equal(torch.load(target)["weights"], torch.arange(5))
    assert issubclass(CheckpointError, UserError)


SLOW_SAVER = """
import sys, time, torch
from hivetrain.callbacks import checkpoint_file
whole = checkpoint_file._FirstError.write
def slowly(self, data):
    count = whole(self, data)
    self._file.flush()
    open(sys.argv[1] + "/../writing", "a").write("x")
    time.sleep(0.02 if WRITTEN else 0)
    return count
checkpoint_file._FirstError.write = slowly
WRITTEN = False
io = checkpoint_file.WholeFileIO()
tensors = {str(n): torch.full((2000,), float(n)) for n in range(60)}
io.save_checkpoint(tensors, sys.argv[1] + "/last.ckpt")
print("first", flush=True)
WRITTEN = True
io.save_checkpoint({name: tensor + 1 for name, tensor in tensors.items()}, sys.argv[1] + "/last.ckpt")
print("second", flush=True)
"""


@pytest.mark.parametrize("writes", [1, 20, 60])
def test_kill_9_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, writes):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SLOW_SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "first\n"
        marks, deadline = tmp_path / "writing", time.monotonic() + 60
        before = marks.stat().st_size
        while marks.stat().st_size < before + writes:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.communicate(timeout=10)[0]
    assert rest == "", "it was killed in mid write"
    assert (folder / ".last.ckpt.unfinished").exists()
    kept = torch.load(folder / "last.ckpt")
    assert all(torch.equal(kept[str(n)], torch.full((2000,), float(n))) for n in range(60))


def test_a_new_training_removes_what_was_left_and_needs_no_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".epoch-00000007.ckpt.unfinished").write_text("left by a crash")
    trainer(SwarmCheckpoint(str(folder)), StopAtSwarmEpoch(1), silent()).fit(model(), CountingData())
    assert sorted(os.listdir(folder)) == ["epoch-00000001.ckpt", "last.ckpt"]
    assert isinstance(CausalLM.load_from_checkpoint(Path(folder) / "last.ckpt", weights_only=True), CausalLM)
