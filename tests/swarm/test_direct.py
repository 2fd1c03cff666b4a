"""Rounds over direct links: what comes out, who is let in, and what stays open."""

import asyncio
import contextlib
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from linked import Nodes, identities
from members import digests, make_group_of

from hivetrain.averaging.direct.frames import Kind
from hivetrain.averaging.direct.handshake import Credentials, Direction, HandshakeError, Hello
from hivetrain.averaging.report import Outcome


def make_vectors(members, numel):
    generator = torch.Generator().manual_seed(members * numel)
    return [torch.randn(numel, generator=generator) for _ in range(members)]


@pytest.mark.parametrize("transport", ["auto", "direct-plain"])
@pytest.mark.parametrize("codec", ["none", "fp16", "int8"])
def test_members_end_with_the_same_bytes_of_the_weighted_mean(transport, codec):
    vectors, samples = make_vectors(3, 1_000_003), (1, 2, 5)

    async def run():
        async with Nodes(3, transport=transport) as nodes:
            return await nodes.average(vectors, nodes.group(samples), codec=codec)

    results = asyncio.run(run())
    assert [result.verdict.outcome for result in results] == [Outcome.AVERAGED] * 3, results
    assert len(digests([result.verdict.average for result in results])) == 1
    expected = sum(v.double() * n for v, n in zip(vectors, samples, strict=True)).float() / 8
    tolerance = {"none": 1e-6, "fp16": 4e-3, "int8": 8e-2}[codec]
    torch.testing.assert_close(results[0].verdict.average, expected, rtol=0, atol=tolerance)
    mode = "direct" if transport == "auto" else transport
    assert all(way == mode for result in results for way in result.ways.values())
    assert {result.verdict.fraction for result in results} == {1.0}
    assert sum(r.verdict.bytes_sent for r in results) == sum(r.verdict.bytes_received for r in results) > 0


def test_links_are_kept_between_rounds_and_closed_in_the_end():
    vectors = make_vectors(3, 300_000)

    async def run():
        async with Nodes(3) as nodes:
            seen = []
            for _ in range(3):
                results = await nodes.average(vectors)
                assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
                links = [link for node in nodes.nodes for kept in node.paths.links._links.values() for link in kept]
                seen.append(set(map(id, links)))
                assert len(links) == 6
            assert seen[0] == seen[1] == seen[2]
        assert all(link.is_released for link in links)

    before = set(threading.enumerate())
    asyncio.run(run())
    left = [t.name for t in set(threading.enumerate()) - before if "link" in t.name]
    assert not left


@pytest.mark.parametrize("listens", [True, False])
def test_links_that_were_closed_are_given_back(listens, monkeypatch):
    monkeypatch.setattr("hivetrain.averaging.direct.links._SWEEP_S", 0.05)

    async def run():
        async with Nodes(2) as nodes:
            first, second = nodes.nodes
            options, service = first.options, SimpleNamespace()
            paths = first.paths if listens else options.open("run", service, first.rounds, 4.0, None, client_mode=True)
            links = [
                await paths.links.dial(second.peer_id, [("127.0.0.1", second.paths.contact.port)], 3.0)
                for _ in range(4)
            ]
            for link in links:
                link.close()
            async with asyncio.timeout(5):
                while not all(link.is_released for link in links):
                    await asyncio.sleep(0.01)
            assert not paths.links._closed
            await paths.stop()

    asyncio.run(run())


# Who is let in


def accept_one(credentials, timeout_s=3.0):
    """A listening socket, and a future of what the handshake with the first who comes ends with."""
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        sock, _ = server.accept()
        sock.settimeout(timeout_s)
        with server, sock:
            _, peer_id, hello = credentials.accept(sock, HELLO.run)
            return peer_id, hello

    return server.getsockname(), ThreadPoolExecutor(1).submit(accept)


HELLO = Hello(Direction.SENDING, b"l" * 16, b"r" * 32)


def test_both_ends_of_a_link_prove_who_they_are():
    server, client = identities(2)
    address, accepted = accept_one(Credentials(server.peer_id, server))
    with socket.create_connection(address, timeout=3) as sock:
        secured = Credentials(client.peer_id, client).dial(sock, server.peer_id, HELLO)
        assert secured._tls.version() == "TLSv1.3"
        assert accepted.result(5) == (client.peer_id, HELLO)


def test_a_stream_that_tls_has_closed_is_at_its_end():
    server, client = identities(2)
    kept = []

    class Keeps(Credentials):
        def accept(self, sock, run):
            kept.append(super().accept(sock.dup(), run))
            return kept[0]

    address, accepted = accept_one(Keeps(server.peer_id, server))
    with socket.create_connection(address, timeout=3) as sock:
        dialled = Credentials(client.peer_id, client).dial(sock, server.peer_id, HELLO)
        accepted.result(5)
        theirs, room = kept[0][0], memoryview(bytearray(9))
        theirs.send(b"last", b"words")
        with contextlib.suppress(ssl.SSLWantReadError):
            theirs._tls.unwrap()  # says goodbye in TLS, and keeps the socket open
        theirs._flush()
        assert dialled.read(9) == b"lastwords"
        assert dialled.receive_some(room) == 0
        with pytest.raises(ConnectionResetError):
            dialled.read(1)
        theirs.close()


def test_a_peer_that_answers_in_another_ones_place_is_refused():
    server, client, other = identities(3)
    address, accepted = accept_one(Credentials(server.peer_id, server))
    with socket.create_connection(address, timeout=3) as sock, pytest.raises(HandshakeError, match="another peer"):
        Credentials(client.peer_id, client).dial(sock, other.peer_id, HELLO)
    with pytest.raises((HandshakeError, OSError)):
        accepted.result(5)


class Impostor(Credentials):
    """Names another peer's key, and signs with its own."""

    def __init__(self, own, victim):
        super().__init__(own.peer_id, own)
        self.identity = SimpleNamespace(public_key=victim.public_key, sign=own.sign)


def test_who_names_another_peers_key_is_refused():
    server, client, victim = identities(3)
    address, accepted = accept_one(Credentials(server.peer_id, server))
    with socket.create_connection(address, timeout=3) as sock, pytest.raises((HandshakeError, OSError)):
        Impostor(client, victim).dial(sock, server.peer_id, HELLO)
    with pytest.raises(HandshakeError, match="signature is false"):
        accepted.result(5)


def test_a_signature_is_worth_nothing_on_another_connection():
    server, client = identities(2)
    seen = []

    class Keeps(Credentials):
        def __init__(self):
            super().__init__(client.peer_id, client)
            self.identity = SimpleNamespace(public_key=client.public_key, sign=self.sign)

        def sign(self, statement):
            seen.append(client.sign(statement))
            return seen[0]

    keeps = Keeps()
    for refused in (False, True):
        address, accepted = accept_one(Credentials(server.peer_id, server))
        with socket.create_connection(address, timeout=3) as sock:
            if refused:
                with pytest.raises((HandshakeError, OSError)):
                    keeps.dial(sock, server.peer_id, HELLO)
                with pytest.raises(HandshakeError, match="signature is false"):
                    accepted.result(5)
            else:
                keeps.dial(sock, server.peer_id, HELLO).close()
                assert accepted.result(5)[0] == client.peer_id


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(5000)])
@pytest.mark.parametrize("is_plain", [False, True])
def test_garbage_instead_of_a_handshake_is_refused(garbage, is_plain):
    (server,) = identities(1)
    address, accepted = accept_one(Credentials(server.peer_id, None if is_plain else server))
    with socket.create_connection(address, timeout=3) as sock:
        sock.sendall(garbage)
        with suppress(OSError):  # refused already
            sock.shutdown(socket.SHUT_WR)
        with pytest.raises((HandshakeError, OSError)):
            accepted.result(5)


def test_a_stranger_is_no_member_and_nothing_it_sends_is_read():
    vectors = make_vectors(2, 1000)

    async def run():
        async with Nodes(3) as nodes:
            *members, stranger = nodes.nodes
            target = members[0]
            link = await stranger.paths.links.dial(target.peer_id, [("127.0.0.1", target.paths.contact.port)], 3.0)
            group = make_group_of({node.peer_id: node.offer() for node in members})
            link.say(Kind.BALLOT, group.name)
            link.say(Kind.BALLOT, group.name, b"x" * 32)
            results = await asyncio.gather(*(n.average(group, v) for n, v in zip(members, vectors, strict=True)))
            assert target.paths.links._links.keys() == {members[1].peer_id}
            return results

    assert {result.verdict.outcome for result in asyncio.run(run())} == {Outcome.AVERAGED}
