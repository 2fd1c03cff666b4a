"""What a follower keeps on disk, also when the run goes back, and when it is killed meanwhile."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hivetrain.averaging.report import Member
from hivetrain.averaging.state import Snapshot
from hivetrain.averaging.updates import Followed, Update
from hivetrain.strategies.epoch_files import EpochFiles

SNAPSHOT = Snapshot(0, "ab" * 32, {"param/weight": torch.ones(3), "buffer/mean": torch.zeros(1)})


def write(files, *epochs):
    for epoch in epochs:
        update = Update(epoch - 1, (Member("peer", 4, 4.0),))
        files.stage(replace(SNAPSHOT, epoch=epoch), Followed(epoch - 1, "cd" * 32, update))
        files.settle()


def kept(files):
    return [epoch for epoch in range(200) if files.params(epoch) is not None]


def test_old_epochs_are_removed_and_a_half_written_one_is_forgotten(tmp_path):
    files = EpochFiles(tmp_path, keep=2)
    write(files, 1, 2, 3, 4)
    assert kept(files) == [3, 4]
    digest, params = files.params(3)
    assert digest == SNAPSHOT.digest
    assert [(name, tensor.tolist()) for name, tensor in params.items()] == [("weight", [1.0] * 3)]
    (tmp_path / "epoch-000000000009.safetensors").write_bytes(b"half")
    assert EpochFiles(tmp_path, keep=2).latest().epoch == 4
    assert [entry.epoch for entry in files.updates()] == [2, 3]


@pytest.mark.parametrize(("back_to", "left"), [(50, [50, 51]), (103, [102, 103, 104])])
def test_epochs_that_the_run_has_gone_back_from_are_removed(tmp_path, back_to, left):
    files = EpochFiles(tmp_path, keep=4)
    write(files, 102, 103, 104, 105)
    write(files, back_to, back_to + 1)
    assert kept(files) == left
    assert files.latest().epoch == back_to + 1


@pytest.mark.parametrize("killed_at", range(6))
def test_no_file_of_an_abandoned_run_lies_beside_the_one_gone_back_to(tmp_path, monkeypatch, killed_at):
    """Four removals and one renaming; the program is killed before each of them, or not at all."""

    class Killed(BaseException):
        pass

    def mortal(change):
        def changed(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*args, **kwargs)

        return changed

    files, left = EpochFiles(tmp_path, keep=4), [killed_at]
    write(files, 102, 103, 104, 105)
    files.stage(replace(SNAPSHOT, epoch=50), None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        with pytest.raises(Killed) if killed_at < 5 else contextlib.nullcontext():
            files.settle()
    files.discard()
    assert kept(files) == ([50] if killed_at == 5 else list(range(102, 106 - killed_at)))
