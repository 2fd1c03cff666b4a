"""Checks of what goes onto a chain, made before anything is signed: weights and endpoints.

Surprising fact: a chain stores weights as u16, scaled so that the largest is 65535; a weight below a 131070th of the
largest becomes nothing.
"""

import ipaddress
import math
from collections.abc import Collection, Mapping

from hivetrain.chain.base import Code, LedgerError, Rules, Weights
from hivetrain.keys import is_address

U16_MAX = 65535
MAX_ROWS = 65536


def parse_weights(weights: Weights) -> dict[str, float]:
    """Weights as a plain mapping of finite, non-negative floats with at least one above zero.

    Raises:
        LedgerError: INVALID_WEIGHTS.
    """
    pairs = list(weights.items() if isinstance(weights, Mapping) else weights)
    if not 0 < len(pairs) <= MAX_ROWS:
        raise LedgerError(Code.INVALID_WEIGHTS, f"there are {len(pairs)} weights: set between 1 and {MAX_ROWS}")
    parsed: dict[str, float] = {}
    for hotkey, weight in pairs:
        if not is_address(hotkey):
            raise LedgerError(Code.INVALID_WEIGHTS, f"{str(hotkey)[:60]!r} is not a hotkey address")
        if hotkey in parsed:
            raise LedgerError(Code.INVALID_WEIGHTS, f"hotkey {hotkey} has two weights")
        parsed[hotkey] = _number(weight, hotkey)
    if not math.isfinite(sum(parsed.values())) or not any(parsed.values()):
        raise LedgerError(Code.INVALID_WEIGHTS, "the weights sum to zero or to more than a float holds")
    return parsed


def split_registered(weights: Mapping[str, float], uids: Mapping[str, int]) -> tuple[dict[int, float], tuple[str, ...]]:
    """Weights by uid, and the hotkeys that hold none.

    Raises:
        LedgerError: INVALID_WEIGHTS when nothing above zero is left.
    """
    kept = {uids[hotkey]: weight for hotkey, weight in weights.items() if hotkey in uids}
    dropped = tuple(hotkey for hotkey in weights if hotkey not in uids)
    if not any(kept.values()):
        raise LedgerError(Code.INVALID_WEIGHTS, "no weighted hotkey is registered: score against a fresh snapshot")
    return kept, dropped


def to_u16(weights: Mapping[int, float], max_share: float) -> dict[int, int]:
    """Weights as the chain stores them: no share above ``max_share`` where that is possible, then scaled to u16."""
    shares = clip_shares(weights, max_share)
    top = max(shares.values())
    scaled = {uid: round(share / top * U16_MAX) for uid, share in shares.items()}
    return {uid: value for uid, value in sorted(scaled.items()) if value}


def clip_shares(weights: Mapping[int, float], max_share: float) -> dict[int, float]:
    """Shares that sum to 1, the largest cut to ``max_share`` and the cut spread over the rest in proportion.

    When fewer than 1 / max_share uids have a weight no such shares exist, and those with a weight share equally.
    """
    total = math.fsum(weights.values())
    shares = {uid: weight / total for uid, weight in weights.items() if weight > 0}
    if len(shares) * max_share <= 1:
        return dict.fromkeys(shares, 1 / len(shares))
    capped: set[int] = set()
    while True:
        free = math.fsum(share for uid, share in shares.items() if uid not in capped)
        room = 1 - len(capped) * max_share
        scale = room / free if free > 0 else 0.0
        over = {uid for uid, share in shares.items() if uid not in capped and share * scale > max_share + 1e-12}
        if not over:
            return {uid: max_share if uid in capped else share * scale for uid, share in shares.items()}
        capped |= over


def check_row(row: Mapping[int, int], rules: Rules, uid: int, known: Collection[int]) -> None:
    """The chain's own rules for a stored row; a row with only the sender's own uid is exempt from count and share.

    Raises:
        LedgerError: INVALID_WEIGHTS.
    """
    if not row or not set(row) <= set(known):
        raise LedgerError(Code.INVALID_WEIGHTS, "the weights name uids that do not exist")
    if list(row) == [uid]:
        return
    if len(row) < rules.min_weights:
        raise LedgerError(Code.INVALID_WEIGHTS, f"{len(row)} weights above zero, the subnet wants {rules.min_weights}")
    # One unit of slack per entry: the shares were rounded to u16 after they were cut.
    if max(row.values()) > rules.max_weight_share * sum(row.values()) + len(row):
        raise LedgerError(Code.INVALID_WEIGHTS, f"one weight exceeds the share of {rules.max_weight_share:.3f}")


def check_endpoint(ip: str, port: int, allow_loopback: bool) -> str:
    """The ip in its canonical spelling.

    Raises:
        LedgerError: INVALID_ENDPOINT.
    """
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        raise LedgerError(Code.INVALID_ENDPOINT, f"{str(ip)[:60]!r} is not an ip address") from None
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= U16_MAX:
        raise LedgerError(Code.INVALID_ENDPOINT, f"port {port} is not between 1 and {U16_MAX}")
    plain = getattr(address, "ipv4_mapped", None) or address
    if plain.is_loopback and not allow_loopback:
        raise LedgerError(Code.INVALID_ENDPOINT, f"{ip} is this machine only: publish an address others can reach")
    if plain.is_unspecified or plain.is_multicast or plain.is_link_local or str(plain) == "255.255.255.255":
        raise LedgerError(Code.INVALID_ENDPOINT, f"{ip} is no address that others can reach")
    return str(address)


def _number(weight: object, hotkey: str) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise LedgerError(Code.INVALID_WEIGHTS, f"the weight of {hotkey} is not a number")
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise LedgerError(Code.INVALID_WEIGHTS, f"the weight of {hotkey} is {number}: must be finite and >= 0")
    return number
