"""Hotkeys: where their files lie, and the only code that signs with them.

Surprising fact: this module reads Bittensor's wallet files and speaks its signed-request protocol (btauth/1) without
the Bittensor SDK. Importing any part of the SDK imports its network client, which a laptop must not need;
``bittensor_core``, the SDK's own key primitives, loads in 0.03 s and is enough.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import bittensor_core

from hivetrain.errors import UserError

DEFAULT_WALLET_PATH = "~/.bittensor/wallets"
SIGNATURE_BYTES = 64
MAX_AGE_S = 10.0
MAX_SKEW_S = 2.0

_SS58_FORMAT = 42
_SR25519 = int(bittensor_core.CRYPTO_SR25519)
_PROTOCOL = "btauth/1"
_VERSION, _HOTKEY, _RECEIVER, _NONCE, _CRYPTO, _SIGNATURE = (
    f"X-Bittensor-{name}" for name in ("Version", "Hotkey", "Receiver", "Nonce", "Crypto", "Signature")
)


class Hotkey:
    """A resolved sr25519 key: signing takes no file access and about 0.03 ms.

    Args:
        keypair: a ``bittensor_core.Keypair`` that holds its private key.
    """

    def __init__(self, keypair: Any) -> None:
        self.keypair = keypair
        self.address: str = str(keypair.ss58_address)

    @classmethod
    def throwaway(cls) -> "Hotkey":
        """A new key that exists in this process only; for demos and tests."""
        return cls.from_seed(os.urandom(32))

    @classmethod
    def from_seed(cls, seed: bytes) -> "Hotkey":
        """The key of a 32-byte seed."""
        return cls(bittensor_core.Keypair.create_from_seed(seed, _SR25519))

    def sign(self, message: bytes) -> bytes:
        """64 bytes that :func:`verify` accepts for this address and message."""
        return bytes(self.keypair.sign(message))

    def __repr__(self) -> str:
        return f"Hotkey({self.address})"

    def __reduce__(self) -> str:
        raise TypeError("a Hotkey holds a private key and is never pickled; pass its Wallet instead")


@dataclass(frozen=True)
class Wallet:
    """Names the files of one coldkey and one hotkey, in the layout and format of btcli.

    Args:
        name: directory of the coldkey under ``path``.
        hotkey: file name of the hotkey under ``path/name/hotkeys``.
        path: directory of all wallets.
    """

    name: str = "default"
    hotkey: str = "default"
    path: str = DEFAULT_WALLET_PATH

    def __post_init__(self) -> None:
        for part in (self.name, self.hotkey):
            if not part or part.startswith(".") or Path(part).name != part:
                raise UserError(f"{part!r} is not a wallet or hotkey name: use a plain file name")

    @property
    def directory(self) -> Path:
        return Path(self.path).expanduser() / self.name

    @property
    def hotkey_file(self) -> Path:
        return self.directory / "hotkeys" / self.hotkey

    @property
    def coldkey_file(self) -> Path:
        return self.directory / "coldkey"

    def load(self, password: str | None = None) -> Hotkey:
        """Read the hotkey; an encrypted one takes ``password`` or btcli's ``BT_PW_...`` variable.

        Raises:
            UserError: the file is missing, unreadable or needs another password.
        """
        return Hotkey(_read_keypair(self.hotkey_file, password))

    def address(self) -> str:
        """The hotkey's address, from the public file if there is one."""
        public = _public_file(self.hotkey_file)
        return str(_read_keypair(public if public.exists() else self.hotkey_file, None).ss58_address)

    def coldkey_is_locked(self) -> bool:
        """Whether :meth:`load_coldkey` needs a password."""
        try:
            return bool(bittensor_core.keyfile_data_is_encrypted(self.coldkey_file.read_bytes()))
        except OSError:
            return False

    def load_coldkey(self, password: str | None = None) -> Any:
        """The coldkey's keypair, for the one thing that needs it: paying for a registration."""
        return _read_keypair(self.coldkey_file, password)

    def create_hotkey(self) -> Hotkey:
        """Write a new hotkey, unencrypted as btcli does, so that a program can start without a person.

        Raises:
            UserError: the file exists; nothing is ever overwritten.
        """
        return Hotkey(_create_keypair(self.hotkey_file, None))

    def create_coldkey(self, password: str | None) -> str:
        """Write a new coldkey, encrypted when a password is given; returns its address."""
        return str(_create_keypair(self.coldkey_file, password).ss58_address)


def verify(address: str, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` was made over ``message`` by the hotkey ``address``; malformed input is simply False."""
    if len(signature) != SIGNATURE_BYTES or not is_address(address):
        return False
    return bool(bittensor_core.verify(message, signature, address, _SR25519))


def is_address(text: object) -> bool:
    """Whether ``text`` is a hotkey address in the one spelling used here (ss58, format 42)."""
    if not isinstance(text, str) or not 46 <= len(text) <= 48:
        return False
    try:
        public_key = bytes(bittensor_core.ss58_decode(text))
    except ValueError:
        return False
    return bool(bittensor_core.ss58_encode(public_key, _SS58_FORMAT) == text)


class NonceStore(Protocol):
    """Remembers accepted (hotkey, nonce) pairs for at least ``MAX_AGE_S + MAX_SKEW_S`` seconds."""

    def accept(self, address: str, nonce_ns: int, now_ns: int) -> bool:
        """Record the pair; False if it was recorded before."""
        ...


class RequestRefused(Exception):
    """A signed request that must not be served; the message is safe to return to the sender."""


def sign_request(
    hotkey: Hotkey, *, method: str, path: str, body: bytes, receiver: str, nonce_ns: int | None = None
) -> dict[str, str]:
    """Headers that prove: sent by ``hotkey``, to ``receiver``, this body, now (btauth/1).

    Args:
        hotkey: the sender.
        method: HTTP method.
        path: request target exactly as sent, query included.
        body: the raw body.
        receiver: the server's hotkey address; another server refuses the request.
        nonce_ns: nanoseconds since 1970; each retry needs a fresh one.
    """
    nonce = time.time_ns() if nonce_ns is None else nonce_ns
    payload = _payload(method, path, body, nonce, hotkey.address, receiver)
    return {
        _VERSION: "1",
        _HOTKEY: hotkey.address,
        _RECEIVER: receiver,
        _NONCE: str(nonce),
        _SIGNATURE: "0x" + hotkey.sign(payload).hex(),
    }


def verify_request(
    headers: Mapping[str, str],
    body: bytes,
    *,
    method: str,
    path: str,
    receiver: str,
    nonces: NonceStore,
    now_ns: int | None = None,
) -> str:
    """The address that signed this request. It proves possession of a key, not registration.

    The nonce is recorded only after the signature held, so strangers cannot fill the store in another's name.

    Raises:
        RequestRefused: malformed, for another receiver, too old, from the future, altered or replayed.
    """
    given = {key.lower(): value for key, value in headers.items()}
    sender, nonce, signature = _parse_auth(given)
    if given.get(_RECEIVER.lower()) != receiver:
        raise RequestRefused("the request is addressed to another server")
    now = time.time_ns() if now_ns is None else now_ns
    if not -MAX_SKEW_S * 1e9 <= now - nonce <= MAX_AGE_S * 1e9:
        raise RequestRefused(
            f"the request is stale or from the future by {(now - nonce) / 1e9:.1f} s: check the clocks"
        )
    if not verify(sender, _payload(method, path, body, nonce, sender, receiver), signature):
        raise RequestRefused("the signature does not match the request")
    if not nonces.accept(sender, nonce, now):
        raise RequestRefused("the request was already accepted once")
    return sender


def _parse_auth(given: Mapping[str, str]) -> tuple[str, int, bytes]:
    sender, nonce, signature = (given.get(name.lower(), "") for name in (_HOTKEY, _NONCE, _SIGNATURE))
    if given.get(_VERSION.lower()) != "1" or given.get(_CRYPTO.lower(), "sr25519") != "sr25519":
        raise RequestRefused("the request is not signed as btauth/1 with sr25519")
    if not is_address(sender) or not (nonce.isascii() and nonce.isdigit() and len(nonce) <= 20):
        raise RequestRefused("the request carries no valid hotkey and nonce")
    try:
        raw = bytes.fromhex(signature.removeprefix("0x")[: 2 * SIGNATURE_BYTES + 2])
    except ValueError:
        raise RequestRefused("the signature is not hexadecimal") from None
    return sender, int(nonce), raw


def _payload(method: str, path: str, body: bytes, nonce: int, sender: str, receiver: str) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    return "\n".join((_PROTOCOL, "sr25519", method.upper(), path, digest, str(nonce), sender, receiver)).encode()


def _public_file(secret_file: Path) -> Path:
    return secret_file.with_name(secret_file.name + "pub.txt")


def _read_keypair(file: Path, password: str | None) -> Any:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read key file {file} ({error.strerror}); create one with: hivetrain keys new"
        ) from None
    try:
        if bittensor_core.keyfile_data_is_encrypted(data):
            data = bytes(bittensor_core.decrypt_keyfile_data(data, password or _password_from_environment(file)))
        return bittensor_core.deserialize_keypair_from_keyfile_data(data)
    except (bittensor_core.KeyfileError, bittensor_core.WrongPasswordError, ValueError):
        raise UserError(f"key file {file} is damaged, or its password is another") from None


def _password_from_environment(file: Path) -> str:
    """The password where btcli keeps it, encoded as btcli does."""
    variable = "BT_PW_" + str(file).replace(os.sep, "_").replace(".", "_").upper()
    try:
        found = bittensor_core.get_password_from_environment(variable)
    except bittensor_core.KeyfileError:
        raise UserError(f"{variable} is not in the form that btcli writes") from None
    if not found:
        raise UserError(f"key file {file} is encrypted: its password is expected as btcli saves it, in {variable}")
    return str(found)


def _create_keypair(file: Path, password: str | None) -> Any:
    keypair = bittensor_core.Keypair.create_from_mnemonic(bittensor_core.Keypair.generate_mnemonic(12), _SR25519)
    secret = bytes(bittensor_core.serialized_keypair_to_keyfile_data(keypair))
    if password is not None:
        secret = bytes(bittensor_core.encrypt_keyfile_data(secret, password))
    public = bittensor_core.Keypair(
        ss58_address=keypair.ss58_address,
        public_key=bytes(keypair.public_key),
        crypto_type=_SR25519,
        ss58_format=_SS58_FORMAT,
    )
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write_new(file, secret)
    _write_new(_public_file(file), bytes(bittensor_core.serialized_keypair_to_keyfile_data(public)))
    return keypair


def _write_new(file: Path, data: bytes) -> None:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"{file} exists; keys are never overwritten: choose another name") from None
    with os.fdopen(descriptor, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
