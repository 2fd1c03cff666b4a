"""What a validator tells of its scores: one line for each miner, sealed by the validator's hotkey.

Surprising fact: nobody is paid by it. Weights go to the chain; this is only why they are what they are, for people.
A long board has several pages, because a DHT record has a limit.
"""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import msgpack

from hivetrain.contribution import fields
from hivetrain.contribution.envelope import open_envelope, seal_envelope
from hivetrain.contribution.fields import MAX_INT, RecordError
from hivetrain.keys import Hotkey, is_address

KIND = "scores"
MAX_BOARD_BYTES = 14 * 1024  # larger stores can break hivemind's pipe
MAX_PAGES = 16
MAX_REASON_BYTES = 120
_MAX_MINERS = 1024
_MAX_VERDICTS = 16
_LIMITS = {KIND: MAX_BOARD_BYTES}
_ENVELOPE_BYTES = 256


class Scored(Protocol):
    """One hotkey's tempo, as ``hivetrain.scoring.TempoScore`` has it."""

    @property
    def samples(self) -> int: ...

    @property
    def counts(self) -> Mapping[Any, int]: ...


@dataclass(frozen=True)
class MinerScore:
    """One line.

    Args:
        hotkey: the miner's address.
        samples: verified in the tempo; 0 if it is forfeited.
        verdicts: contributions of the tempo by verdict: (verdict, number).
        average: the moving average of its samples.
        weight: its share, 0 to 1.
        reason: why its last contribution that was not paid was not, for people; "" if all were.
    """

    hotkey: str
    samples: int
    verdicts: tuple[tuple[str, int], ...]
    average: float
    weight: float
    reason: str = ""

    def __post_init__(self) -> None:
        if not is_address(self.hotkey):
            raise RecordError("hotkey is not an address")
        fields.check_int("samples", self.samples, 0, MAX_INT)
        if len(self.verdicts) > _MAX_VERDICTS:
            raise RecordError(f"a miner has at most {_MAX_VERDICTS} kinds of verdicts")
        for verdict, number in self.verdicts:
            fields.check_name("verdict", verdict, 24)
            fields.check_int("a number of verdicts", number, 0, MAX_INT)
        if type(self.average) is not float or not 0 <= self.average < 2**53:
            raise RecordError("average is out of range")
        if type(self.weight) is not float or not 0 <= self.weight <= 1:
            raise RecordError("weight must lie between 0 and 1")
        if self.reason:
            fields.check_name("reason", self.reason, MAX_REASON_BYTES)


@dataclass(frozen=True)
class Scoreboard:
    """A validator's scores of one tempo, or one page of them.

    Args:
        run_id: the run.
        hotkey: the validator's address.
        block: the tempo's last block.
        miners: the lines.
    """

    run_id: str
    hotkey: str
    block: int
    miners: tuple[MinerScore, ...]

    def __post_init__(self) -> None:
        fields.check_head(self.run_id, self.hotkey, self.block)
        if len(self.miners) > _MAX_MINERS:
            raise RecordError(f"a scoreboard has at most {_MAX_MINERS} miners")


def scoreboard(
    run_id: str,
    validator: str,
    block: int,
    scores: Mapping[str, Scored],
    averages: Mapping[str, float],
    weights: Mapping[str, float],
    reasons: Mapping[str, str] | None = None,
) -> Scoreboard:
    """The board of a tempo that has just been scored.

    Args:
        run_id: the run.
        validator: address of the hotkey that will seal it.
        block: the tempo's last block.
        scores: of the tempo by hotkey.
        averages: after the tempo by hotkey.
        weights: shares by hotkey.
        reasons: by hotkey, why its last unpaid contribution was not paid.
    """
    miners = []
    for hotkey in sorted({*scores, *averages, *weights}):
        score = scores.get(hotkey)
        counts = () if score is None else tuple((str(verdict), n) for verdict, n in score.counts.items() if n)
        reason = (reasons or {}).get(hotkey, "").encode(errors="replace")[:MAX_REASON_BYTES].decode(errors="ignore")
        line = MinerScore(
            hotkey, 0 if score is None else score.samples, counts, float(averages.get(hotkey, 0.0)),
            min(1.0, float(weights.get(hotkey, 0.0))), reason,
        )  # fmt: skip
        miners.append(line)
    return Scoreboard(run_id, validator, block, tuple(miners[:_MAX_MINERS]))


def seal_scoreboard(board: Scoreboard, hotkey: Hotkey, expires: float) -> list[tuple[str, bytes]]:
    """The signed pages with their DHT keys; the subkey is ``hotkey_subkey`` of the validator.

    Args:
        board: whose ``hotkey`` is that of the key.
        hotkey: the key that signs.
        expires: DHT time at which the pages are forgotten, seconds.
    """
    if board.hotkey != hotkey.address:
        raise RecordError(f"the scoreboard is of hotkey {board.hotkey}, the key is {hotkey.address}")
    pages = _pages(board)
    sealed = []
    for number, miners in enumerate(pages):
        payload = msgpack.packb([board.run_id, board.hotkey, board.block, number, len(pages), miners])
        key = scores_key(board.run_id, number)
        sealed.append((key, seal_envelope(KIND, key, payload, hotkey, expires, _LIMITS)))
    return sealed


def open_scoreboard(data: Any, run_id: str, page: int) -> tuple[Scoreboard, int]:
    """Parses and verifies one page as it lay under the key of ``page``; returns it and the number of pages.

    Raises:
        RecordError: it is no page of a scoreboard of this run.
    """
    envelope = open_envelope(data, _LIMITS)
    found_run, hotkey, block, number, pages, entries = fields.unpack(envelope.payload, 6)
    fields.check_int("pages", pages, 1, MAX_PAGES)
    place = run_id, envelope.hotkey, page, scores_key(run_id, page)
    if (found_run, hotkey, number, envelope.key) != place:
        raise RecordError("the scoreboard is of another run, hotkey or page than the place where it lay")
    if type(entries) is not list:
        raise RecordError("a scoreboard has a list of miners")
    return Scoreboard(run_id, envelope.hotkey, block, tuple(_miner(entry) for entry in entries)), pages


def scores_key(run_id: str, page: int) -> str:
    """DHT key under which the validators' pages of this number lie, by hotkey."""
    return f"{run_id}_scores_{page}"


def _pages(board: Scoreboard) -> list[list[tuple[Any, ...]]]:
    room = MAX_BOARD_BYTES - _ENVELOPE_BYTES - 2 * len(board.run_id.encode())  # it is in the key as well
    pages: list[list[tuple[Any, ...]]] = [[]]
    used = 0
    for miner in _by_weight(board.miners):
        line = astuple(miner)
        size = len(msgpack.packb(line))
        if used + size > room:
            if len(pages) == MAX_PAGES:
                break
            pages.append([])
            used = 0
        pages[-1].append(line)
        used += size
    return pages


def _by_weight(miners: Iterable[MinerScore]) -> list[MinerScore]:
    """Those who earn most first: they are on the first page, and left out last."""
    return sorted(miners, key=lambda miner: (-miner.weight, miner.hotkey))


def _miner(entry: Any) -> MinerScore:
    if type(entry) is not list or len(entry) != 6 or type(entry[2]) is not list:
        raise RecordError("a line of a scoreboard has another form")
    verdicts = entry[2]
    if any(type(pair) is not list or len(pair) != 2 for pair in verdicts):
        raise RecordError("a line of a scoreboard has another form")
    return MinerScore(entry[0], entry[1], tuple((verdict, number) for verdict, number in verdicts), *entry[3:])
