"""Who is at the other end of a direct connection: proven by libp2p identities before anything else is read.

Python's ``ssl`` cannot ask for a client's certificate without an authority that signed it. So the server shows a
certificate whose key its identity has signed, and the client answers, inside TLS, with a signature over the server's
certificate and nonce: a signature that is worth nothing on any other connection.
"""

import datetime
import hashlib
import os
import socket
import ssl
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hivemind.p2p import PeerID

from hivetrain.averaging.direct.stream import Stream, TLSStream
from hivetrain.swarm.identity import Identity, verify_statement

VERSION = 2
_MAGIC = b"HVTD"
_OID = x509.ObjectIdentifier("2.25.325311475108913478436711053406120493061")
_CERTIFICATE, _CLIENT = b"hivetrain direct link, certificate:", b"hivetrain direct link, client:"
_CHALLENGE = struct.Struct(">4sB32s")
_HELLO = struct.Struct(">4sBB16s32sHH")
_MAX_FIELD = 1024
_ACCEPTED = b"\x01"


class HandshakeError(Exception):
    """The other end is not who it should be, or does not speak this protocol."""


class Direction(IntEnum):
    """Which way the bytes of a connection flow, seen from who dialled."""

    SENDING = 1
    RECEIVING = 2


@dataclass(frozen=True)
class Hello:
    """What a dialler says of a connection.

    Attributes:
        direction: which way bytes will flow.
        link: 16 random bytes, equal for the two connections of a link.
        run: SHA-256 of the run's name.
    """

    direction: Direction
    link: bytes
    run: bytes


class Credentials:
    """This peer's side of all handshakes.

    Args:
        peer_id: own id.
        identity: the key behind it; None: plain TCP, where ids are claims that nobody checks.
    """

    def __init__(self, peer_id: PeerID, identity: Identity | None) -> None:
        if identity is not None and identity.peer_id != peer_id:
            raise ValueError("the identity is another peer's")
        self.peer_id, self.identity = peer_id, identity
        if identity is not None:
            self._server_context, self._certificate = _server_context(identity)
            self._client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._client_context.minimum_version = ssl.TLSVersion.TLSv1_3
            self._client_context.check_hostname = False
            self._client_context.verify_mode = ssl.CERT_NONE  # checked below, against the peer id

    def dial(self, sock: socket.socket, expected: PeerID, hello: Hello) -> Stream:
        """Proves both ends to each other on a fresh connection that this peer opened.

        Raises:
            HandshakeError: it is not ``expected`` who answers.
            OSError: the connection broke, was closed, or all of it took longer than the socket's timeout.
        """
        stream, certificate, limit = Stream(sock), b"", _limit_of(sock)
        if self.identity is not None:
            stream = TLSStream(sock, self._client_context, server_side=False)
            certificate = stream.greet()
            if _peer_of(certificate) != expected:
                raise HandshakeError("another peer answered")
        limit()
        magic, version, nonce = _CHALLENGE.unpack(stream.read(_CHALLENGE.size))
        if (magic, version) != (_MAGIC, VERSION):
            raise HandshakeError("the other end speaks another protocol")
        if self.identity is None:
            key, signature = self.peer_id.to_bytes(), b""
        else:
            key = self.identity.public_key
            signature = self.identity.sign(_statement(certificate, nonce, expected, hello))
        head = _HELLO.pack(_MAGIC, VERSION, hello.direction, hello.link, hello.run, len(key), len(signature))
        limit()
        stream.send(head + key + signature)
        if stream.read(1) != _ACCEPTED:
            raise HandshakeError("refused")
        return stream

    def accept(self, sock: socket.socket, run: bytes) -> tuple[Stream, PeerID, Hello]:
        """Proves both ends to each other on a connection that somebody opened to this peer.

        Raises:
            HandshakeError: whoever it is does not prove to be a peer of the run.
            OSError: the connection broke, was closed, or all of it took longer than the socket's timeout.
        """
        stream, limit = Stream(sock), _limit_of(sock)
        if self.identity is not None:
            stream = TLSStream(sock, self._server_context, server_side=True)
            stream.greet()
        nonce = os.urandom(32)
        limit()
        stream.send(_CHALLENGE.pack(_MAGIC, VERSION, nonce))
        magic, version, direction, link, their_run, key_size, signature_size = _HELLO.unpack(stream.read(_HELLO.size))
        if (magic, version) != (_MAGIC, VERSION) or direction not in tuple(Direction):
            raise HandshakeError("the other end speaks another protocol")
        if max(key_size, signature_size) > _MAX_FIELD:
            raise HandshakeError("a key or signature is too long")
        if their_run != run:
            raise HandshakeError("a peer of another run")
        limit()
        both = stream.read(key_size + signature_size)
        key, signature = both[:key_size], both[key_size:]
        hello = Hello(Direction(direction), link, run)
        try:
            if self.identity is None:
                peer_id = PeerID(key)
            else:
                peer_id = verify_statement(key, _statement(self._certificate, nonce, self.peer_id, hello), signature)
        except ValueError as error:
            raise HandshakeError(str(error)) from None
        limit()
        stream.send(_ACCEPTED)
        return stream, peer_id, hello


def _limit_of(sock: socket.socket) -> Callable[[], None]:
    """To be called before each step: makes the socket's timeout one for all steps together."""
    timeout_s = sock.gettimeout()
    assert timeout_s is not None, "a handshake has a deadline"
    deadline = time.monotonic() + timeout_s
    return lambda: sock.settimeout(max(0.01, deadline - time.monotonic()))


def _statement(certificate: bytes, nonce: bytes, server: PeerID, hello: Hello) -> bytes:
    bound = hashlib.sha256(certificate).digest() + nonce + hashlib.sha256(server.to_bytes()).digest()
    return _CLIENT + bound + bytes([hello.direction]) + hello.link + hello.run


def _peer_of(certificate: bytes) -> PeerID:
    """The peer that signed the key of a certificate; that the other end holds the key, TLS has shown."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        extension = parsed.extensions.get_extension_for_oid(_OID).value
        assert isinstance(extension, x509.UnrecognizedExtension)
        size = int.from_bytes(extension.value[:2])
        key, signature = extension.value[2 : 2 + size], extension.value[2 + size :]
        return verify_statement(key, _CERTIFICATE + _spki(parsed.public_key()), signature)
    except Exception as error:  # a certificate can be wrong in many ways, and cryptography's errors share no base class
        raise HandshakeError(f"the certificate names no peer: {error}") from None


def _spki(key) -> bytes:  # type: ignore[no-untyped-def]  # any of a dozen kinds of public keys
    return bytes(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def _server_context(identity: Identity) -> tuple[ssl.SSLContext, bytes]:
    """A context with a fresh certificate, whose key the identity has signed, and the certificate in DER."""
    key = ec.generate_private_key(ec.SECP256R1())
    signature = identity.sign(_CERTIFICATE + _spki(key.public_key()))
    value = len(identity.public_key).to_bytes(2) + identity.public_key + signature
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hivetrain")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # nobody looks: the key lives as long as the process
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.UnrecognizedExtension(_OID, value), critical=False)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody would read them
    with tempfile.TemporaryDirectory() as folder:  # ssl takes keys from files only; mode 0700
        path = Path(folder) / "certificate.pem"
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
        context.load_cert_chain(path)
    return context, certificate.public_bytes(serialization.Encoding.DER)
