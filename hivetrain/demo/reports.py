"""What the demo's miners wrote about themselves, and the summary that follows from it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class MinerLog:
    """A miner's report file, read as it grows.

    Attributes:
        start: the record written before the first microbatch, None until then.
        epochs: swarm_epoch -> record of that epoch.
        end: the record written after the last epoch; None if the miner did not get there.
    """

    path: Path
    start: dict[str, Any] | None = None
    epochs: dict[int, dict[str, Any]] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    _offset: int = 0

    def read(self) -> None:
        """Takes in the complete lines that were added since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            record = json.loads(line)
            if record["event"] == "epoch":
                self.epochs[record["swarm_epoch"]] = record
            elif record["event"] == "start":
                self.start = record
            elif record["event"] == "end":
                self.end = record

    @property
    def tokens(self) -> int:
        return sum(record["tokens"] for record in self.epochs.values())


def loss_at(logs: list[MinerLog], epoch: int) -> float | None:
    """Mean training loss of an epoch over the samples of all miners; None if nobody reported one."""
    records = [log.epochs[epoch] for log in logs if epoch in log.epochs and log.epochs[epoch]["loss"] is not None]
    samples = sum(record["samples"] for record in records)
    return sum(record["loss"] * record["samples"] for record in records) / samples if samples else None


def summarize(
    logs: list[MinerLog], exit_codes: list[int | None], wall_s: float, honest: Sequence[bool] = ()
) -> dict[str, Any]:
    """The demo's summary; every figure is from the miners' own reports.

    ``swarm_epochs`` is the lowest epoch at which a miner ended, ``digests_equal`` whether all that ended hold
    bit-identical params. Held-out losses are means over the miners that reported one; training losses and tokens are
    those of the honest miners (default: all).
    """
    ended = [log for log in logs if log.end is not None]
    epochs = sorted({epoch for log in logs for epoch in log.epochs})
    trusted = [log for log, is_honest in zip(logs, honest or [True] * len(logs), strict=True) if is_honest]
    losses = [loss for epoch in epochs if (loss := loss_at(trusted, epoch)) is not None]
    ends = [log.end for log in ended if log.end is not None]
    tokens = sum(log.end["tokens"] for log in trusted if log.end is not None)
    training_s = max((end["wall_s"] for end in ends), default=0.0)
    return {
        "swarm_epochs": min((end["swarm_epoch"] for end in ends), default=0),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "heldout_loss_first": _mean([log.start["heldout_loss"] for log in logs if log.start is not None]),
        "heldout_loss_last": _mean([end["heldout_loss"] for end in ends]),
        "tokens": tokens,
        "tokens_per_s": tokens / training_s if training_s else None,
        "miners": [
            {
                "peer_id": (log.start or {}).get("peer_id"),
                "swarm_epoch": log.end["swarm_epoch"] if log.end else max(log.epochs, default=-1) + 1,
                "samples": log.end["samples"] if log.end else sum(r["samples"] for r in log.epochs.values()),
                "params_digest": log.end["params_digest"] if log.end else None,
                "exit_code": code,
            }
            for log, code in zip(logs, exit_codes, strict=True)
        ],
        "digests_equal": len(ends) > 0 and len({end["params_digest"] for end in ends}) == 1,
        "wall_s": wall_s,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
