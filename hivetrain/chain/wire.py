"""What a served ledger and its clients say to each other: JSON of known shape and size.

Surprising fact: plain ``json`` accepts NaN, infinities and repeated keys; here all three are refused.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar

from hivetrain.chain.base import Code, LedgerError, Neuron, Outcome, Receipt, Rules, Snapshot

REQUEST_LIMIT = 1 << 20
RESPONSE_LIMIT = 16 << 20
MAX_NEURONS = 65536

T = TypeVar("T")


def loads(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: anything else, or NaN, infinity, a repeated key, nesting that exhausts the stack.
    """
    try:
        value = json.loads(data, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("the JSON is no object")
    return value


def dumps(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def snapshot_to_dict(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "block": snapshot.block,
        "block_hash": snapshot.block_hash,
        "next_epoch": snapshot.next_epoch,
        "rules": asdict(snapshot.rules),
        "neurons": [asdict(neuron) for neuron in snapshot.neurons],
    }


def snapshot_from_dict(data: Mapping[str, Any]) -> Snapshot:
    """Raises ValueError when the shape is another."""
    neurons = data.get("neurons")
    if not isinstance(neurons, list) or len(neurons) > MAX_NEURONS:
        raise ValueError("the snapshot has no list of neurons of a sane length")
    return Snapshot(
        block=typed(data, "block", int),
        block_hash=typed(data, "block_hash", str),
        next_epoch=typed(data, "next_epoch", int),
        rules=_flat(Rules, data.get("rules")),
        neurons=tuple(_flat(Neuron, neuron) for neuron in neurons),
    )


def receipt_to_dict(receipt: Receipt) -> dict[str, Any]:
    return {**asdict(receipt), "dropped": list(receipt.dropped)}


def receipt_from_dict(data: Mapping[str, Any]) -> Receipt:
    """Raises ValueError when the shape is another."""
    dropped = typed(data, "dropped", list)
    if not all(isinstance(hotkey, str) for hotkey in dropped):
        raise ValueError("dropped holds something that is no hotkey")
    return Receipt(
        Outcome(typed(data, "outcome", str)),
        typed(data, "block", int | None),
        tuple(dropped),
        typed(data, "detail", str),
    )


def error_to_dict(error: LedgerError) -> dict[str, Any]:
    return {"code": error.code.value, "message": error.message, "retry_after_blocks": error.retry_after_blocks}


def error_from_dict(data: Mapping[str, Any]) -> LedgerError:
    """Raises ValueError when the shape is another."""
    return LedgerError(
        Code(typed(data, "code", str)), typed(data, "message", str)[:500], typed(data, "retry_after_blocks", int | None)
    )


def typed(data: Mapping[str, Any], name: str, kind: Any) -> Any:
    """``data[name]`` if it is of that kind; an int will do for a float, a bool for nothing but a bool."""
    value = data.get(name)
    if isinstance(value, bool) and kind is not bool:
        raise ValueError(f"{name} must not be a truth value")
    if kind is float and isinstance(value, int) and abs(value) < 1 << 63:
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"{name} is missing or of the wrong type")
    return value


def _flat(cls: type[T], data: Any) -> T:
    if not isinstance(data, dict):
        raise ValueError(f"a {cls.__name__} is missing")
    return cls(**{item.name: typed(data, item.name, item.type) for item in fields(cls)})  # type: ignore[arg-type]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found
