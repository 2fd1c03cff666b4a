"""A peer's identity: a private key in a file, from which its peer id follows.

The surprising fact: hivemind writes a new key world-readable for an instant, and p2pd reports a damaged one only as a
protobuf parser's complaint; so the file is made, and checked, here.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hivemind.p2p import PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.errors import UserError

MAX_IDENTITY_BYTES = 64 * 1024
MAX_PUBLIC_KEY_BYTES = 1024
_RSA_BITS = range(2048, 4097)


class Identity:
    """A peer's private key; signs what others check against the peer id alone."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key = key
        encoded = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.public_key = crypto_pb2.PublicKey(key_type=crypto_pb2.KeyType.RSA, data=encoded).SerializeToString()
        self.peer_id = _peer_id_of(self.public_key)

    def sign(self, statement: bytes) -> bytes:
        """Signs as libp2p does with RSA keys: PKCS #1 v1.5 with SHA-256."""
        return self._key.sign(statement, padding.PKCS1v15(), hashes.SHA256())


@contextmanager
def identity_file(path: str | os.PathLike[str] | None) -> Iterator[str]:
    """A file to keep the identity in: ``path``, or for None one in a private folder that is gone afterwards."""
    if path is not None:
        yield os.fspath(path)
        return
    with TemporaryDirectory(prefix="hivetrain-") as folder:
        yield os.path.join(folder, "identity")


def load_identity(path: str | os.PathLike[str]) -> Identity:
    """The key in an identity file.

    Raises:
        UserError: the file cannot be read, or does not hold an RSA key.
    """
    ensure_identity(path)
    content = crypto_pb2.PrivateKey.FromString(Path(path).read_bytes())
    key = serialization.load_der_private_key(content.data, password=None)
    if not isinstance(key, rsa.RSAPrivateKey):
        raise UserError(f"identity file {os.fspath(path)} holds no RSA key")
    return Identity(key)


def verify_statement(public_key: bytes, statement: bytes, signature: bytes) -> PeerID:
    """The peer that signed ``statement``.

    Args:
        public_key: libp2p's encoding of the signer's key, not trusted.

    Raises:
        ValueError: there is no such peer, or it did not sign this.
    """
    if len(public_key) > MAX_PUBLIC_KEY_BYTES or len(signature) > MAX_PUBLIC_KEY_BYTES:
        raise ValueError("a public key or signature is too long")
    try:
        message = crypto_pb2.PublicKey.FromString(public_key)
        key = serialization.load_der_public_key(message.data)
    except Exception as error:  # protobuf, DER and key errors share no base class
        raise ValueError(f"not a public key: {error}") from None
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size not in _RSA_BITS:
        raise ValueError("not an RSA key of 2048 to 4096 bits")
    try:
        key.verify(signature, statement, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        raise ValueError("the signature is false") from None
    return _peer_id_of(public_key)


def _peer_id_of(public_key: bytes) -> PeerID:
    return PeerID(b"\x12\x20" + hashlib.sha256(public_key).digest())  # a multihash: SHA-256, 32 bytes


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
