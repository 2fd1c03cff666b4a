"""The training state of a run's last epochs, one file each, so that a program may be killed at any moment."""

import contextlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hivetrain.averaging.state import Snapshot
from hivetrain.averaging.updates import Followed, Update


class EpochFiles:
    """Files ``epoch-N.safetensors`` in a directory; each appears whole or not at all.

    Args:
        directory: created when the first file is written.
        keep: epochs to keep.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self._keep = directory, keep

    def stage(self, snapshot: Snapshot, followed: Followed | None) -> None:
        """Writes an epoch's state, with the update that led to it if it was followed; see :meth:`settle`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {"digest": snapshot.digest}
        if followed is not None and followed.update is not None:
            metadata |= {"before": followed.params_digest, "update": followed.update.header().hex()}
        path = self._path(snapshot.epoch).with_suffix(".staged")
        save_file({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, path, metadata)

    def settle(self) -> None:
        """What was staged is true: keeps it, and removes the oldest epochs, and those beyond it: the run has gone back.

        These go first, the newest before the others, so that a program that is killed never finds them beside it.
        """
        staged = sorted(self.directory.glob("epoch-*.staged"))
        for epoch in reversed(self._epochs()):
            if staged and epoch > _number(staged[-1]):
                self._path(epoch).unlink(missing_ok=True)
        for path in staged:
            os.replace(path, path.with_suffix(".safetensors"))
        for epoch in self._epochs()[: -self._keep]:
            self._path(epoch).unlink(missing_ok=True)

    def discard(self) -> None:
        """What was staged is false, or was left behind by a program that was killed."""
        for path in self.directory.glob("epoch-*.staged"):
            path.unlink(missing_ok=True)

    def latest(self) -> Snapshot | None:
        """The newest state that can be read."""
        for epoch in reversed(self._epochs()):
            with contextlib.suppress(OSError, SafetensorError), safe_open(self._path(epoch), "pt") as file:
                return Snapshot(epoch, file.metadata()["digest"], {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return None

    def params(self, epoch: int) -> tuple[str, dict[str, torch.Tensor]] | None:
        """The params of an epoch, their digest and they by name, or None."""
        try:
            with safe_open(self._path(epoch), "pt") as file:
                names = [name for name in file.keys() if name.startswith("param/")]  # noqa: SIM118
                return file.metadata()["digest"], {n.removeprefix("param/"): file.get_tensor(n) for n in names}
        except (OSError, SafetensorError):
            return None

    def updates(self) -> list[Followed]:
        """Each update that led to a kept state, without its average, in order."""
        found = []
        for epoch in self._epochs():
            with contextlib.suppress(OSError, SafetensorError), safe_open(self._path(epoch), "pt") as file:
                metadata = file.metadata()
                if "update" in metadata:
                    update = Update.parse_header(bytes.fromhex(metadata["update"]))
                    found.append(Followed(update.epoch, metadata["before"], update))
        return found

    def _path(self, epoch: int) -> Path:
        return self.directory / f"epoch-{epoch:012d}.safetensors"

    def _epochs(self) -> list[int]:
        return sorted(map(_number, self.directory.glob("epoch-*.safetensors")))


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("epoch-"))
