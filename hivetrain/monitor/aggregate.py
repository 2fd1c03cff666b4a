"""From what many peers say of a swarm epoch to one line.

Surprising fact: nothing is averaged. Each peer's word counts the same and the median is taken, so that a few liars move
the picture no further than the honest peers differ.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from hivetrain.averaging.report import Outcome
from hivetrain.monitor.status import EpochNote, RoundNote

_COMMITTED = (str(Outcome.AVERAGED), str(Outcome.ALONE), str(Outcome.LOCAL))


@dataclass(frozen=True)
class EpochLine:
    """One swarm epoch and the exchange that ended it.

    Attributes:
        epoch: its number.
        at: when it was first heard of, seconds since 1970.
        loss: median over the peers of their mean training loss; None if nobody told one.
        loss_low: lower quartile.
        loss_high: upper quartile.
        heldout_loss: median of the held-out losses measured at this epoch.
        reporters: peers that told a loss.
        diverged: peers whose loss was not a number.
        samples: samples of those peers.
        outcome: of the exchange, as most peers saw it; "" if nobody told, and then all that follows is None.
        group_size: members that exchanged with each other.
        expected_peers: live peers when it began.
        fraction: share of the vector received.
        matchmaking_s: seconds until there was a group.
        exchange_s: seconds of exchange and vote.
        bytes_sent: by a peer.
        bytes_received: by a peer.
        batch_samples: samples in the committed average.
        failed: attempts that led to nothing, over all peers.
        reason: of one of them.
    """

    epoch: int
    at: float = 0.0
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    heldout_loss: float | None = None
    reporters: int = 0
    diverged: int = 0
    samples: int = 0
    outcome: str = ""
    group_size: int | None = None
    expected_peers: int | None = None
    fraction: float | None = None
    matchmaking_s: float | None = None
    exchange_s: float | None = None
    bytes_sent: int | None = None
    bytes_received: int | None = None
    batch_samples: int | None = None
    failed: int = 0
    reason: str = ""


def epoch_line(
    epoch: int, at: float, notes: Sequence[EpochNote], rounds: Sequence[RoundNote], heldout: Sequence[float]
) -> EpochLine:
    """What all peers' notes of one epoch come to."""
    told = [note.loss for note in notes if note.loss is not None]
    losses = sorted(loss for loss in told if math.isfinite(loss))
    measured = [loss for loss in heldout if math.isfinite(loss)]
    line = EpochLine(
        epoch,
        at,
        loss=median(losses) if losses else None,
        loss_low=losses[len(losses) // 4] if losses else None,
        loss_high=losses[-1 - len(losses) // 4] if losses else None,
        heldout_loss=median(measured) if measured else None,
        reporters=len(told),
        diverged=len(told) - len(losses),
        samples=sum(note.samples for note in notes),
    )
    return _with_exchange(line, rounds) if rounds else line


def _with_exchange(line: EpochLine, rounds: Sequence[RoundNote]) -> EpochLine:
    done = [note for note in rounds if note.outcome in _COMMITTED]
    failed = [note for note in rounds if note.outcome not in _COMMITTED]
    shown = done or failed
    outcomes = Counter(note.outcome for note in shown)
    return replace(
        line,
        outcome=min(outcomes, key=lambda name: (-outcomes[name], name)),
        group_size=int(median(note.group_size for note in shown)),
        expected_peers=int(median(note.expected_peers for note in shown)),
        fraction=median(note.fraction for note in shown),
        matchmaking_s=median(note.matchmaking_s for note in shown),
        exchange_s=median(note.exchange_s for note in shown),
        bytes_sent=int(median(note.bytes_sent for note in shown)),
        bytes_received=int(median(note.bytes_received for note in shown)),
        batch_samples=int(median(note.samples for note in shown)),
        failed=len(failed),
        reason=failed[-1].reason if failed else "",
    )
