"""What hostile peers can do before and beside the rounds: with certificates, half-open links, slots and notices."""

import asyncio
import datetime
import ssl

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from linked import Nodes

from hivetrain.averaging.direct.handshake import HandshakeError, _peer_of
from hivetrain.averaging.report import Outcome

NUMEL = 100_000


def make_certificate():
    """A key, and a certificate in DER with two extensions."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    for oid in ("1.2.3.4", "1.2.3.5"):
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), b"a"), critical=False)
    return key, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def with_one_extension_twice(certificate):
    return certificate.replace(bytes.fromhex("06032a0305"), bytes.fromhex("06032a0304"))


DAMAGES = {
    "one extension twice": with_one_extension_twice,
    "version 10": lambda c: c.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020109"), 1),
    "an unknown kind of key": lambda c: c.replace(bytes.fromhex("2a8648ce3d0201"), bytes.fromhex("2a8648ce3d0209"), 1),
    "an unknown curve": lambda c: c.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030177"), 1),
    "no peer": lambda c: c,
    "cut off": lambda c: c[:100],
    "nothing": lambda c: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_strange_certificate_is_refused_like_any_other(damage):
    with pytest.raises(HandshakeError, match="names no peer"):
        _peer_of(DAMAGES[damage](make_certificate()[1]))


def test_a_member_with_a_strange_certificate_fails_nothing_but_the_link(tmp_path):
    key, certificate = make_certificate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "certificate.pem").write_bytes(
        pem + ssl.DER_cert_to_PEM_cert(with_one_extension_twice(certificate)).encode()
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem")

    async def run():
        async with Nodes(2) as nodes:
            hostile = nodes.nodes[1]
            hostile.paths.links._credentials._server_context = context
            hostile.paths.links.dial = nobody_answers
            return await nodes.average([torch.ones(NUMEL)] * 2)

    results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
    assert results[0].ways == {1: "libp2p"}


async def nobody_answers(*_):
    return None


def test_what_goes_wrong_in_choosing_a_way_is_the_members_fault_and_ends_the_round_alone():
    async def run():
        async with Nodes(2) as nodes:
            nodes.nodes[0].paths.links.find = fails
            return await nodes.nodes[0].average(nodes.group(), torch.ones(NUMEL))

    def fails(*_):
        raise LookupError("out of place")

    verdict = asyncio.run(run()).verdict
    assert (verdict.outcome, verdict.culprits) == (Outcome.INCOMPLETE, (1,))
    assert "out of place" in verdict.reason
