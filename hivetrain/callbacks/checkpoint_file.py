"""Writes a checkpoint so that it is whole or not there, and says why when it cannot.

Surprising fact: torch writes through C++, where "No space left on device" becomes a complaint about an unexpected
position in a file. So the first error of the file itself is kept, and raised in place of what torch makes of it.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

UNFINISHED = ".unfinished"


class WholeFileIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place, flushed to the disk, and then moved there at once.

    Unlike Lightning's own it holds no second copy in memory and needs no room in the system's temporary directory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write the file.

        Raises:
            OSError: It cannot be written; what was at ``path`` is still there.
        """
        if "://" in str(path) or storage_options is not None:  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}{UNFINISHED}")
        try:
            with unfinished.open("wb") as file:
                _write(checkpoint, file)
            unfinished.replace(target)
            sync_directory(target.parent)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise


def sync_directory(path: Path) -> None:
    """Make sure that the names in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _FirstError:
    """A file for torch to write to that remembers what went wrong first."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    sink = _FirstError(file)
    try:
        torch.save(checkpoint, sink)  # type: ignore[arg-type]  # needs no more than write and flush
    except (OSError, RuntimeError):
        if sink.error is not None:
            raise sink.error from None
        raise
    file.flush()
    os.fsync(file.fileno())
