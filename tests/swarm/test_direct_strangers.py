"""What hostile peers can do before and beside the rounds: with certificates, half-open links, slots and notices."""

import asyncio
import datetime
import os
import socket
import ssl
import time

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from linked import Nodes
from members import make_group_of, make_peer_id

from hivetrain.averaging.direct.frames import Header, Kind
from hivetrain.averaging.direct.handshake import Credentials, Direction, HandshakeError, Hello, _peer_of
from hivetrain.averaging.direct.unclaimed import Unclaimed
from hivetrain.averaging.report import Outcome

NUMEL = 100_000
DIRECT = [{1: "direct"}, {0: "direct"}]


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


# Those who are no members


async def average(*members):
    """A round of two members; it has to go over a direct link."""
    group = make_group_of({node.peer_id: node.offer() for node in members})
    results = await asyncio.gather(*(node.average(group, torch.ones(NUMEL)) for node in members))
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}, results
    assert [result.ways for result in results] == DIRECT


def test_a_strangers_half_open_links_keep_nobody_out():
    async def run():
        async with Nodes(3) as nodes:
            *members, stranger = nodes.nodes
            links, address = stranger.paths.links, ("127.0.0.1", members[1].paths.contact.port)
            kept = []
            for _ in range(64):
                hello = Hello(Direction.SENDING, os.urandom(16), links._run)
                until = time.monotonic() + 5.0
                kept.append(await asyncio.to_thread(links._dial_once, members[1].peer_id, address, hello, until))
            await average(*members)
            for stream in kept:
                stream.close()

    asyncio.run(run())


class Connection:
    """As far as :class:`Unclaimed` looks at one."""

    is_closed = False

    def close(self):
        self.is_closed = True


def test_strangers_links_make_room_for_new_ones():
    unclaimed, connections, link = Unclaimed(), [Connection() for _ in range(400)], bytes(16)
    for pair in zip(connections[::2], connections[1::2], strict=True):
        stranger = make_peer_id()
        for direction, connection in zip(Direction, pair, strict=True):
            unclaimed.add(stranger, Hello(direction, link, b"r" * 32), connection)
            unclaimed.add(make_peer_id(), Hello(direction, link, b"r" * 32), Connection())
    assert sum(not connection.is_closed for connection in connections) == 2 * 64
    member, streams = make_peer_id(), [Connection(), Connection()]
    for direction, stream in zip(Direction, streams, strict=True):
        unclaimed.add(member, Hello(direction, link, b"r" * 32), stream)
    assert unclaimed.take(member) == streams[::-1]  # what the dialler sends on, this end receives from
    assert not unclaimed.take(member)
    unclaimed.close_older_than(0.0)
    assert all(connection.is_closed for connection in connections)


def test_silent_connections_do_not_keep_a_member_from_dialling():
    async def run():
        async with Nodes(2, part_timeout_s=10.0) as nodes:
            first, second = nodes.nodes
            second.paths.links.dial = nobody_answers
            silent = [socket.create_connection(("127.0.0.1", first.paths.contact.port)) for _ in range(64)]
            async with asyncio.timeout(5):
                while len(first.paths.links._handshaking) < 64:
                    await asyncio.sleep(0.01)
            start = time.monotonic()
            await average(first, second)
            assert time.monotonic() - start < 2.0
            async with asyncio.timeout(4):  # all at once: their time has passed, whoever waited for whom
                while first.paths.links._handshaking:
                    await asyncio.sleep(0.01)
            for sock in silent:
                sock.close()

    asyncio.run(run())


def test_a_handshake_has_one_time_limit_for_all_its_steps():
    server = Credentials(make_peer_id(), None)
    ours, theirs = socket.socketpair()
    ours.settimeout(1.0)
    head = Hello(Direction.SENDING, b"l" * 16, b"r" * 32)

    def dribble():
        time.sleep(0.7)
        theirs.sendall(b"HVTD" + bytes([2, head.direction]) + head.link + head.run + bytes([0, 34, 0, 0]))

    async def run():
        slowly = asyncio.create_task(asyncio.to_thread(dribble))
        with pytest.raises(OSError, match="timed out"):
            await asyncio.to_thread(server.accept, ours, head.run)
        taken_s = time.monotonic() - start
        await slowly
        return taken_s

    with ours, theirs:
        start = time.monotonic()
        assert asyncio.run(run()) < 1.5


def test_a_peer_of_another_run_is_told_so_before_it_counts_on_the_link():
    async def run():
        async with Nodes(2) as nodes:
            first, second = nodes.nodes
            hello = Hello(Direction.SENDING, b"l" * 16, b"of another run".ljust(32))
            address, until = ("127.0.0.1", second.paths.contact.port), time.monotonic() + 5.0
            with pytest.raises((HandshakeError, ConnectionResetError)):
                await asyncio.to_thread(first.paths.links._dial_once, second.peer_id, address, hello, until)

    asyncio.run(run())


def test_what_a_peer_says_of_other_rounds_pushes_out_nothing_of_a_member():
    async def run():
        async with Nodes(3) as nodes:
            vectors = [torch.ones(NUMEL)] * 3
            assert {result.verdict.outcome for result in await nodes.average(vectors)} == {Outcome.AVERAGED}
            first, second, other = nodes.nodes
            group = make_group_of({node.peer_id: node.offer() for node in (first, second)})
            early = asyncio.create_task(first.average(group, vectors[0]))
            heard = second.paths._agreements._early
            async with asyncio.timeout(3):
                while group.name not in heard.get(first.peer_id, ()):
                    await asyncio.sleep(0.01)
            link, names = other.paths.links.find(second.peer_id), [os.urandom(32) for _ in range(5000)]
            frames = b"".join(Header(Kind.USE, name).to_bytes() for name in names)
            await asyncio.to_thread(link.outgoing.send, b"", frames, lambda: False)
            async with asyncio.timeout(10):
                while names[-1] not in heard.get(other.peer_id, ()):
                    await asyncio.sleep(0.01)
            assert len(heard[other.peer_id]) <= 8
            results = [await second.average(group, vectors[1]), await early]
            assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}, results
            assert [result.ways for result in results] == DIRECT[::-1]

    asyncio.run(run())
