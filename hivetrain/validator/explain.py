"""Every factor of one miner's score, with the evidence, read from a validator's state file.

Surprising fact: nothing is computed again. What is shown is what was written down when the verdict was given, so it can
be read while the validator runs, and by somebody who has neither its data nor its model.
"""

import json
import math
import sqlite3
from typing import Any

from hivetrain.errors import UserError

_UNPAID = ("not exchanged", "late", "early", "invalid", "unjudged")


def explain(connection: sqlite3.Connection, hotkey: str) -> dict[str, Any]:
    """What a validator knows about a hotkey, as plain values.

    Args:
        connection: as :func:`hivetrain.validator.schema.open_read_only` gives it.
        hotkey: address, or the beginning of one.

    Raises:
        UserError: no hotkey begins like this, or several do.
    """
    connection.execute("BEGIN")  # one view of a file that changes
    try:
        address = _resolve(connection, hotkey)
        return _finite(_describe(connection, address))
    finally:
        connection.execute("ROLLBACK")


def _resolve(connection: sqlite3.Connection, hotkey: str) -> str:
    query = "SELECT hotkey FROM records UNION SELECT hotkey FROM positions"
    found = {row[0] for row in connection.execute(query)}
    for row in connection.execute("SELECT averages FROM tempos ORDER BY block DESC LIMIT 1"):
        found |= set(json.loads(row[0]))
    matching = sorted(address for address in found if address.startswith(hotkey))
    if not hotkey or len(matching) > 1:
        shown = ", ".join(matching[:5]) + (" …" if len(matching) > 5 else "")
        raise UserError(f"{len(matching)} hotkeys begin with {hotkey!r}: {shown}")
    if not matching:
        raise UserError(f"this validator has seen nothing of a hotkey {hotkey!r}")
    return matching[0]


def _describe(connection: sqlite3.Connection, hotkey: str) -> dict[str, Any]:
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    query = "SELECT * FROM records WHERE hotkey = ? ORDER BY swarm_epoch, seen"
    records = [_record(row) for row in connection.execute(query, (hotkey,))]
    tempos = [_tempo(row, hotkey) for row in connection.execute("SELECT * FROM tempos ORDER BY block")]
    commitments = {record["commitment"] for record in records}
    counts: dict[str, int] = {}
    for record in records:
        counts[record["verdict"] or "open"] = counts.get(record["verdict"] or "open", 0) + 1
    return {
        "hotkey": hotkey,
        "uid": records[-1]["uid"] if records else None,
        "run_id": facts.get("run_id"),
        "validator": facts.get("hotkey"),
        "average": tempos[-1]["average"] if tempos else None,
        "weight": tempos[-1]["weight"] if tempos else None,
        "verdicts": counts,
        "tempos": tempos,
        "audits": [record for record in records if record["drawn"]],
        "unpaid": [record for record in records if record["verdict"] in _UNPAID],
        "noted": [record for record in records if record["note"]],
        "rounds_flagged": _flagged(connection, commitments),
        "rounds_unchecked": _unchecked(connection, commitments),
    }


def _record(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "swarm_epoch": row["swarm_epoch"],
        "uid": row["slot"],
        "peer_id": row["peer_id"],
        "samples": row["samples"],
        "commitment": row["commitment"].hex(),
        "seen_block": row["seen"],
        "beacon_block": row["beacon"],
        "beacon_hash": row["beacon_hash"],
        "due_block": row["due"],
        "drawn": json.loads(row["drawn"] or "[]"),
        "revealed": row["reveal"] is not None or bool(json.loads(row["leaves"])),
        "exchanged": bool(row["exchanged"]),
        "verdict": row["verdict"],
        "reason": row["reason"],
        "note": row["note"].strip(),
        "leaves": json.loads(row["leaves"]),
        "tempo": row["tempo"],
    }


def _tempo(row: sqlite3.Row, hotkey: str) -> dict[str, Any]:
    score = json.loads(row["scores"]).get(hotkey, {"samples": 0, "forfeited": False, "counts": {}})
    return {
        "block": row["block"],
        "scored_at": row["scored_at"],
        "samples": score["samples"],
        "forfeited": score["forfeited"],
        "verdicts": score["counts"],
        "average": json.loads(row["averages"]).get(hotkey, 0.0),
        "weight": json.loads(row["weights"]).get(hotkey, 0.0),
        "status": row["status"],
        "receipt": row["receipt"],
    }


def _flagged(connection: sqlite3.Connection, commitments: set[str]) -> list[dict[str, Any]]:
    """Rounds of this hotkey in which somebody, who is not known, sent something else than it committed to."""
    query = "SELECT * FROM rounds WHERE NOT sum_error <= sum_tolerance ORDER BY epoch"
    return [
        {"swarm_epoch": row["epoch"], "sum_error": row["sum_error"], "tolerance": row["sum_tolerance"]}
        for row in connection.execute(query)
        if commitments & {member[3] for member in json.loads(row["members"])}
    ]


def _unchecked(connection: sqlite3.Connection, commitments: set[str]) -> list[dict[str, Any]]:
    """Rounds of this hotkey of which that cannot be said, for some members had no readable record."""
    query = "SELECT * FROM rounds WHERE unrecorded IS NOT NULL ORDER BY epoch"
    return [
        {"swarm_epoch": row["epoch"], "unrecorded": row["unrecorded"]}
        for row in connection.execute(query)
        if commitments & {member[3] for member in json.loads(row["members"])}
    ]


def _finite(value: Any) -> Any:
    """The same with "inf" and "nan" spelled out: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
