"""Who was paid what in the demo, and whether that is as it should be."""

from contextlib import closing
from pathlib import Path
from typing import Any

from hivetrain.contribution.audit import Verdict
from hivetrain.demo.options import Options
from hivetrain.demo.subnet import Subnet
from hivetrain.errors import UserError
from hivetrain.validator.explain import explain
from hivetrain.validator.schema import open_read_only

AGREEMENT = 0.02


def pay_of(subnet: Subnet, options: Options, miners: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of the summary that the ledger and the validators' state files tell.

    ``incentive`` and ``emission`` are of the chain's last epoch, ``earned`` is all since the start, by hotkey.
    ``audits`` are those of the first validator, which are added to ``miners``.
    """
    view, earned, weights = subnet.snapshot(), subnet.earnings(), subnet.weights()
    validators = [subnet.hotkeys[name] for name in options.validator_names]
    rows: list[dict[str, Any]] = [{"hotkey": hotkey, "weights": weights.get(hotkey, {})} for hotkey in validators]
    for miner in miners:
        miner["weights"] = [row["weights"].get(miner["hotkey"], 0.0) for row in rows]
        miner |= _evidence(subnet.state_file(options.validator_names[0]) if rows else None, miner["hotkey"])
    return {
        "validators": rows,
        "incentive": {neuron.hotkey: neuron.incentive for neuron in view.neurons},
        "emission": {neuron.hotkey: neuron.emission for neuron in view.neurons},
        "earned": {hotkey: earned.get(hotkey, 0.0) for hotkey in subnet.hotkeys.values()},
        "cheats": {miner["hotkey"]: miner["cheat"] for miner in miners if miner["cheat"]},
        "weights_differ_by": max((max(m["weights"]) - min(m["weights"]) for m in miners if rows), default=0.0),
    }


def _evidence(state: Path | None, hotkey: str) -> dict[str, Any]:
    """Verified samples and audits of a miner, by what one validator has written down."""
    verified, verdicts = 0, {}
    if state is not None:
        with closing(open_read_only(state)) as connection:
            try:
                known = explain(connection, hotkey)
            except UserError:  # it has seen nothing of this hotkey
                known = {"tempos": [], "verdicts": {}}
        verified, verdicts = sum(tempo["samples"] for tempo in known["tempos"]), known["verdicts"]
    audits = {verdict: verdicts.get(verdict, 0) for verdict in (Verdict.PASSED, Verdict.FAILED, Verdict.MISSING)}
    return {"verified": verified, "audits": audits}


def settled(summary: dict[str, Any]) -> bool:
    """Whether every validator has set weights, they agree, no cheat has any, and some honest miner has."""
    weighted = all(row["weights"] for row in summary["validators"])
    cheated = any(any(miner["weights"]) for miner in summary["miners"] if miner["cheat"])
    return weighted and not cheated and summary["weights_differ_by"] <= AGREEMENT
