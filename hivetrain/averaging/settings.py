"""What all peers of a run must have in common, and how a newcomer learns in what it differs."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MAX_SETTINGS_BYTES = 4096


class SettingsMismatch(Exception):
    """This peer's settings are not those of the run; the message names each difference."""


@dataclass(frozen=True)
class RunSettings:
    """Settings that make peers' gradients comparable.

    Attributes:
        model: digest of names, dtypes and shapes of the params.
        num_params: number of trainable params.
        target_batch_size: samples per global update.
        compression: codec of the exchange.
        optimizer: class name of the optimizer.
        reduction: how the members' gradients become one; see ``rules.RULES``.
        protocol: version of what peers say to each other, digests included; raised with each change of it.
    """

    model: str
    num_params: int
    target_batch_size: int
    compression: str
    optimizer: str
    reduction: str = "mean"
    protocol: int = 4

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def fingerprint(self) -> bytes:
        """First 16 bytes of the SHA-256 of :meth:`to_bytes`: the settings' name, which cannot be forged."""
        return hashlib.sha256(self.to_bytes()).digest()[:16]

    def differences(self, theirs: bytes, fingerprint: bytes) -> str:
        """Lists where the settings in ``theirs`` (untrusted) differ, or says that they cannot be read."""
        if not theirs or find_settings([theirs], fingerprint) != theirs:
            return "their settings are not published"
        try:
            other = json.loads(theirs)
        except ValueError:
            return "their settings are unreadable"
        if not isinstance(other, dict):
            return "their settings are unreadable"
        own = asdict(self)
        named = [
            f"{key} is {str(other.get(key))[:80]} there and {own[key]} here"
            for key in own
            if other.get(key) != own[key]
        ]
        return "; ".join(named) or "they have settings unknown here"


def find_settings(candidates: Iterable[Any], fingerprint: bytes) -> bytes:
    """Of these untrusted values the one that the fingerprint names; b"" if it is not among them."""
    for data in candidates:
        small = isinstance(data, bytes) and len(data) <= MAX_SETTINGS_BYTES
        if small and hashlib.sha256(data).digest()[:16] == fingerprint:
            return bytes(data)
    return b""
