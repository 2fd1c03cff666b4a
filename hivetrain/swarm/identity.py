"""A peer's identity: a private key in a file, from which its peer id follows.

The surprising fact: hivemind writes a new key world-readable for an instant, and p2pd reports a damaged one only as a
protobuf parser's complaint; so the file is made, and checked, here.
"""

import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.errors import UserError

MAX_IDENTITY_BYTES = 64 * 1024


def ensure_identity(path: str | os.PathLike[str]) -> str:
    """Create the identity file (mode 0400, with its directory) when it is missing.

    Returns:
        The peer id that follows from it.

    Raises:
        UserError: the file cannot be read or written, or does not hold a key.
    """
    identity = Path(path)
    try:
        if not identity.exists():
            _write_new_identity(identity)
        with identity.open("rb") as file:
            content = file.read(MAX_IDENTITY_BYTES)
    except OSError as error:
        raise UserError(f"identity file {identity} cannot be used: {error.strerror or error}") from error
    try:
        return PeerID.from_identity(content).to_base58()
    except Exception as error:  # protobuf, DER and key errors share no base class
        raise UserError(
            f"identity file {identity} holds no usable private key: restore it, or move it away to get a new peer id"
        ) from error


def _write_new_identity(identity: Path) -> None:
    key = crypto_pb2.PrivateKey(key_type=crypto_pb2.KeyType.RSA, data=RSAPrivateKey().to_bytes())
    identity.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=identity.parent, prefix=f".{identity.name}.") as file:  # created with mode 0600
        file.write(key.SerializeToString())
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o400)
        with suppress(FileExistsError):  # another process was first: its key counts
            os.link(file.name, identity)
