"""One line for what goes wrong most often: what happened, and the next step.

Surprising fact: torch has two ways to run out of memory. A GPU raises ``torch.OutOfMemoryError``; a CPU raises a plain
RuntimeError that is told from a bug only by its text.
"""

import errno
import sys

from hivetrain.errors import UserError

DISK_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "file too large"}
SMALLER = "lower data.batch_size (the swarm's target_batch_size stays), then data.block_size, or take a smaller model"
SEE_DOCTOR = "hivetrain doctor -c CONFIG checks the rest"
NEXT_STEPS = (  # a part of a message, and what to do about it; the first that fits counts
    ("local time must be within", "this machine's clock is off: set it by NTP (timedatectl set-ntp true)"),
    ("no bootstrap server gave", f"check the URLs and that a bootstrap runs (hivetrain bootstrap); {SEE_DOCTOR}"),
    ("cannot join the swarm through", f"check the addresses and the firewall between; {SEE_DOCTOR}"),
    ("Address already in use", "end the program that has the port (ss -ltnp), or choose another"),
)


def explain(error: BaseException) -> str | None:
    """One line with the next step, or None if this is not a mistake that is known."""
    cause: BaseException | None = error
    while cause is not None:
        line = _explain_one(cause)
        if line is not None:
            return " ".join(line.split())
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _explain_one(error: BaseException) -> str | None:
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return f"out of memory{_wanted(error)}: {SMALLER}"
    if isinstance(error, UserError):
        step = next((step for part, step in NEXT_STEPS if part in str(error)), None)
        return f"{error}: {step}" if step and step not in str(error) else str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" at {error.filename}" if error.filename else ""
        return f"{DISK_FULL[error.errno]}{where}: free some space, or move what is written (checkpoint.dirpath, cache)"
    if type(error).__name__ == "SettingsMismatch" and type(error).__module__ == "hivetrain.averaging.settings":
        return str(error)
    if type(error).__name__ == "LedgerError" and type(error).__module__ == "hivetrain.chain.base":
        return f"the chain refused: {error}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # an error of torch's can only come from a torch that is loaded
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # A UserError too: the parser of the configuration hands on what a constructor ran into, as text.
    text = str(error) if isinstance(error, RuntimeError | UserError) else ""
    return any(sign in text for sign in ("DefaultCPUAllocator", "CUDA out of memory", "Cannot allocate memory"))


def _wanted(error: BaseException) -> str:
    """What torch says that it tried to get, in its own figures."""
    text = str(error)
    for before, after in (("you tried to allocate ", "."), ("Tried to allocate ", ". ")):
        if before in text:
            return f" (another {text.partition(before)[2].partition(after)[0]} did not fit)"
    return ""
