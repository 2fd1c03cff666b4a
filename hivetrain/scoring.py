"""What verified work is worth: samples of one tempo, a moving average by hotkey, weights.

Pure: no clock, no chain, no files. Pay grows in proportion to samples and nothing else, so a small miner has its share
and a miner that splits its work over several hotkeys gains nothing. Surprising fact: nobody is paid on trust. Who has
no standing, being new or having lost it, earns nothing before an audit that it passes; so who fakes everything never
earns anything, however seldom it is drawn.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from hivetrain.contribution.audit import Verdict

PAID = frozenset({Verdict.PASSED, Verdict.NOT_DRAWN})
FORFEITING = frozenset({Verdict.FAILED, Verdict.MISSING})


@dataclass(frozen=True)
class Judged:
    """One contribution and what became of it.

    Args:
        hotkey: who is paid.
        swarm_epoch: the update that it went into.
        samples: as committed.
        verdict: the outcome.
    """

    hotkey: str
    swarm_epoch: int
    samples: int
    verdict: Verdict


@dataclass(frozen=True)
class TempoScore:
    """One hotkey's tempo.

    Args:
        samples: verified ones; 0 if the tempo is forfeited.
        forfeited: whether an audit failed or a reveal was missing.
        counts: contributions by verdict.
    """

    samples: int
    forfeited: bool
    counts: Mapping[Verdict, int]

    @property
    def proven(self) -> bool:
        """Whether an audit was passed."""
        return not self.forfeited and self.counts.get(Verdict.PASSED, 0) > 0


def tempo_scores(judged: Iterable[Judged]) -> dict[str, TempoScore]:
    """Scores of one tempo by hotkey, in any order of the input the same."""
    by_hotkey: dict[str, list[Judged]] = {}
    for entry in judged:
        by_hotkey.setdefault(entry.hotkey, []).append(entry)
    return {hotkey: _score(by_hotkey[hotkey]) for hotkey in sorted(by_hotkey)}


def update_averages(
    averages: Mapping[str, float], scores: Mapping[str, TempoScore], registered: Collection[str], alpha: float = 0.5
) -> dict[str, float]:
    """The moving averages after one more tempo. Without an average yet, it takes a passed audit to begin one.

    Args:
        averages: before it.
        scores: of the tempo; who is not in it has done nothing, and its average decays.
        registered: hotkeys that hold a uid now; all others are forgotten.
        alpha: share of the new tempo, above 0 and at most 1.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie above 0 and not above 1, got {alpha}")
    updated = {}
    for hotkey in sorted(registered):
        score = scores.get(hotkey)
        before = 0.0 if score is not None and score.forfeited else averages.get(hotkey, 0.0)
        counts = score is not None and (before > 0 or score.proven)
        updated[hotkey] = (1 - alpha) * before + alpha * (score.samples if score is not None and counts else 0)
    return {hotkey: value for hotkey, value in updated.items() if value > 0}


def weights(averages: Mapping[str, float]) -> dict[str, float]:
    """Shares by hotkey, sorted, which sum to 1; empty if nobody has earned anything."""
    total = math.fsum(averages.values())  # exact, so that the order of the input does not matter
    if total <= 0:
        return {}
    return {hotkey: averages[hotkey] / total for hotkey in sorted(averages) if averages[hotkey] > 0}


def _score(entries: list[Judged]) -> TempoScore:
    counts = {verdict: sum(entry.verdict is verdict for entry in entries) for verdict in Verdict}
    forfeited = any(counts[verdict] for verdict in FORFEITING)
    verified = sum(entry.samples for entry in entries if entry.verdict in PAID)
    return TempoScore(0 if forfeited else verified, forfeited, {v: n for v, n in counts.items() if n})
