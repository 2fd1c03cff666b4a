"""The tables that people see: swarm, miners, validators, weights. Pure: from what was read to plain JSON values.

Surprising fact: a hotkey in a status record is a claim, and so is a peer in a contribution. A hotkey is shown as proven
only where the peer names the hotkey and the hotkey the peer, each in a record that nobody else can write.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from hivetrain.averaging.progress import SwarmView
from hivetrain.averaging.settings import RunSettings
from hivetrain.chain.base import Neuron, Snapshot
from hivetrain.contribution.scoreboard import MinerScore, Scoreboard
from hivetrain.monitor.roster import Member, Presence

MAX_MATRIX = 256  # miners in the weight matrix, and validators
_UNPAID = {"failed", "missing", "late", "early", "invalid", "not exchanged"}


@dataclass(frozen=True)
class ChainView:
    """What the chain said last.

    Attributes:
        address: as given by the user.
        snapshot: None before the first answer.
        weights: validator to miner to share.
        boards: validators' scores by their hotkey.
        error: why there is no newer answer; "" while there is.
        read_at: of the snapshot, seconds since 1970.
    """

    address: str
    snapshot: Snapshot | None = None
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    boards: Mapping[str, Scoreboard] = field(default_factory=dict)
    error: str = ""
    read_at: float = 0.0

    def neuron(self, hotkey: str | None) -> Neuron | None:
        """Who is registered under a hotkey."""
        return self.snapshot.neuron(hotkey) if self.snapshot is not None and hotkey else None

    @cached_property
    def voters(self) -> dict[str, float]:
        """Stake by hotkey of the validators that have set weights."""
        neurons = self.snapshot.neurons if self.snapshot is not None else ()
        return {n.hotkey: n.stake for n in neurons if n.permit and self.weights.get(n.hotkey)}

    @cached_property
    def lines(self) -> dict[str, list[MinerScore]]:
        """What the validators say of each miner, that of the highest stake first."""
        neurons = [neuron for hotkey in self.boards if (neuron := self.neuron(hotkey)) is not None]
        found: dict[str, list[MinerScore]] = {}
        for neuron in sorted(neurons, key=lambda n: (-n.stake, n.hotkey)):
            for line in self.boards[neuron.hotkey].miners:
                found.setdefault(line.hotkey, []).append(line)
        return found

    def is_validator(self, hotkey: str) -> bool:
        """Whether it may set weights."""
        neuron = self.neuron(hotkey)
        return neuron is not None and neuron.permit


def swarm_table(view: SwarmView, members: Sequence[Member], settings: RunSettings | None) -> dict[str, Any]:
    """The run as a whole."""
    statuses = [member.status for member in members if member.status is not None]
    passes = [(status.data_pass, status.window, status.n_windows) for status in statuses if status.n_windows]
    middle = sorted(passes)[(len(passes) - 1) // 2] if passes else None
    losses = [status.loss for status in statuses if status.loss is not None and math.isfinite(status.loss)]
    target = settings.target_batch_size if settings is not None else None
    samples = sum(peer.samples if target is None else min(peer.samples, target)
                  for peer in view.peers if peer.epoch == view.epoch)  # fmt: skip
    return {
        "epoch": view.epoch,
        "peers": len(view.peers),
        "strangers": len(view.strangers),
        "in_step": sum(peer.epoch == view.epoch and peer.digest == view.digest for peer in view.peers),
        "samples": samples,
        "target": target,
        "num_params": settings.num_params if settings is not None else None,
        "optimizer": settings.optimizer if settings is not None else None,
        "compression": settings.compression if settings is not None else None,
        "samples_per_s": sum(peer.samples_per_s for peer in view.peers),
        "tokens_per_s": sum(status.tokens_per_s for status in statuses),
        "tokens": sum(status.tokens for status in statuses),
        "reporting": len(statuses),
        "loss": median(losses) if losses else None,
        "diverged": sum(status.loss is not None and not math.isfinite(status.loss) for status in statuses),
        "data_pass": middle[0] if middle else None,
        "window": middle[1] if middle else None,
        "n_windows": middle[2] if middle else None,
    }


def chain_table(chain: ChainView | None) -> dict[str, Any] | None:
    """State of the chain; None if none was given."""
    if chain is None:
        return None
    view = chain.snapshot
    return {
        "address": chain.address,
        "error": chain.error,
        "read_at": chain.read_at,
        "block": view.block if view else None,
        "next_epoch": view.next_epoch if view else None,
        "tempo": view.tempo if view else None,
        "block_time_s": view.rules.block_time_s if view else None,
        "neurons": len(view.neurons) if view else 0,
        "validators": sum(neuron.permit for neuron in view.neurons) if view else 0,
        "boards": len(chain.boards),
    }


def miner_rows(
    members: Sequence[Member], view: SwarmView, chain: ChainView | None, signed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row for each peer, and for each miner on the chain that is no peer.

    Args:
        members: peers, also those that are gone.
        view: the run.
        chain: None without one.
        signed: hotkey to the peer for which it signed.
    """
    epochs = {peer.peer_id: peer for peer in view.peers}
    strangers = {peer.peer_id for peer in view.strangers}
    rows, hotkeys = [], set()
    for member in members:
        hotkey = member.status.hotkey if member.status is not None else None
        signed_for = signed.get(hotkey) if hotkey is not None else None
        usurped = signed_for is not None and signed_for != member.peer_id
        here = epochs.get(member.peer_id)
        row = _blank(member.peer_id, hotkey) | _peer_columns(member) | {
            "hotkey_proven": signed_for == member.peer_id,
            "usurped": usurped,
            "stranger": member.peer_id in strangers,
            "in_step": here is not None and here.epoch == view.epoch and here.digest == view.digest,
        }  # fmt: skip
        rows.append(row)
        if hotkey and not usurped and member.presence is Presence.LIVE:
            hotkeys.add(hotkey)
    if chain is not None and chain.snapshot is not None:
        absent = [n for n in chain.snapshot.neurons if n.hotkey not in hotkeys and not n.permit]
        rows += [_blank(neuron.hotkey, neuron.hotkey) for neuron in absent]
    for row in rows:
        row.update(_chain_columns(None if row["usurped"] else row["hotkey"], chain))
        row["why"] = _why(row, chain)
    return rows


def validator_rows(chain: ChainView | None) -> list[dict[str, Any]]:
    """One row for each hotkey that may set weights."""
    if chain is None or chain.snapshot is None:
        return []
    block = chain.snapshot.block
    return [
        {
            "hotkey": neuron.hotkey,
            "uid": neuron.uid,
            "stake": neuron.stake,
            "active": neuron.active,
            "dividends": neuron.dividends,
            "updated_blocks_ago": max(0, block - neuron.last_update),
            "miners_weighted": len(chain.weights.get(neuron.hotkey, {})),
            "board_block": chain.boards[neuron.hotkey].block if neuron.hotkey in chain.boards else None,
        }
        for neuron in chain.snapshot.neurons
        if neuron.permit
    ]


def weight_matrix(chain: ChainView | None) -> dict[str, Any]:
    """Who gave whom which share: rows are miners, the best paid first, columns validators."""
    if chain is None or chain.snapshot is None:
        return {"validators": [], "miners": [], "shares": [], "left_out": 0}
    validators = [n.hotkey for n in chain.snapshot.neurons if n.permit][:MAX_MATRIX]
    weighted = {miner for validator in validators for miner in chain.weights.get(validator, {})}
    incentive = {neuron.hotkey: neuron.incentive for neuron in chain.snapshot.neurons}
    miners = sorted(weighted, key=lambda hotkey: (-incentive.get(hotkey, 0.0), hotkey))
    shares = [[chain.weights.get(v, {}).get(miner) for v in validators] for miner in miners[:MAX_MATRIX]]
    left_out = max(0, len(miners) - MAX_MATRIX)
    return {"validators": validators, "miners": miners[:MAX_MATRIX], "shares": shares, "left_out": left_out}


def number(value: float | None) -> float | str | None:
    """As JSON can have it: what is not finite becomes a word."""
    return value if value is None or math.isfinite(value) else "not finite"


def _blank(key: str, hotkey: str | None) -> dict[str, Any]:
    names = (
        "peer_id", "first_seen", "last_seen", "epoch", "samples_now", "samples_per_s", "client_mode", "tokens_per_s",
        "samples", "tokens", "loss", "heldout_loss", "device", "energy_j", "data_pass",
    )  # fmt: skip
    extra = {
        "hotkey_proven": True,
        "usurped": False,
        "stranger": False,
        "in_step": False,
        "presence": "named by no peer",
    }
    return {"key": key, "hotkey": hotkey, **dict.fromkeys(names), **extra}


def _peer_columns(member: Member) -> dict[str, Any]:
    progress, status = member.progress, member.status
    row: dict[str, Any] = {
        "peer_id": member.peer_id,
        "presence": str(member.presence),
        "first_seen": member.first_seen,
        "last_seen": None if member.presence is Presence.LIVE else member.last_seen,
    }
    if progress is not None:
        row |= {
            "epoch": progress.epoch,
            "samples_now": progress.samples,
            "samples_per_s": progress.samples_per_s,
            "client_mode": progress.client_mode,
        }
    if status is not None:
        row |= {
            "tokens_per_s": status.tokens_per_s if member.presence is Presence.LIVE else 0.0,
            "samples": status.samples,
            "tokens": status.tokens,
            "loss": number(status.loss),
            "heldout_loss": number(status.heldout_loss),
            "device": status.device,
            "energy_j": status.energy_j,
            "data_pass": status.data_pass,
        }
    return row


def _chain_columns(hotkey: str | None, chain: ChainView | None) -> dict[str, Any]:
    neuron = chain.neuron(hotkey) if chain is not None else None
    row: dict[str, Any] = dict.fromkeys(("uid", "incentive", "emission", "weight", "verified", "average", "verdicts"))
    row["boards"] = 0
    if chain is None or neuron is None or hotkey is None:
        return row
    row |= {"uid": neuron.uid, "incentive": neuron.incentive, "emission": neuron.emission}
    total = sum(chain.voters.values())
    if total > 0:
        row["weight"] = sum(stake * chain.weights[v].get(hotkey, 0.0) for v, stake in chain.voters.items()) / total
    if lines := chain.lines.get(hotkey, []):
        row |= {
            "boards": len(lines),
            "verified": median(line.samples for line in lines),
            "average": median(line.average for line in lines),
            "verdicts": dict(lines[0].verdicts),
        }
    return row


def _why(row: Mapping[str, Any], chain: ChainView | None) -> str:
    """One sentence on why the miner earns what it earns."""
    if row["stranger"]:
        return "Its settings are not the run's, so nobody averages with it."
    if row["usurped"]:
        return "Its hotkey has signed for another peer."
    if chain is None:
        return "No chain was given."
    if row["hotkey"] is None:
        return "It names no hotkey in a status record, so its pay is not shown."
    if row["uid"] is None:
        return "Its hotkey is not registered." if chain.snapshot is not None else "The chain has not answered yet."
    lines = chain.lines.get(row["hotkey"], [])
    if not lines:
        return "No validator has published scores of it yet."
    bad = [line for line in lines if any(verdict in _UNPAID and n for verdict, n in line.verdicts)]
    told = " ".join(f"{verdict}: {n}." for verdict, n in (bad or lines)[0].verdicts)
    reason = next((line.reason for line in bad if line.reason), "")
    return f"{len(bad)} of {len(lines)} validators object. {told} {reason}".strip() if bad else f"{told}".strip()
