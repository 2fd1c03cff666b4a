"""What a member can do wrong on a direct link: the round fails for all, names it, and the next goes on without it."""

import asyncio
import copy
import os
import socket
import struct
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linked import Nodes
from members import digests, make_group_of

from hivetrain.averaging.blame import Blame
from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.direct.contact import MAX_CONTACT_BYTES, Contact
from hivetrain.averaging.direct.frames import HEADER_BYTES, MAX_PART_BYTES, FrameError, Header, Kind
from hivetrain.averaging.report import Outcome

VICTIM = 2  # the member that misbehaves towards member 0
PART_ELEMENTS = 2**17
NUMEL = 9 * PART_ELEMENTS  # too little for a measured rate, so that all slices stay equal


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr("hivetrain.averaging.layout.PART_ELEMENTS", PART_ELEMENTS)


def make_vectors(members, numel=NUMEL):
    generator = torch.Generator().manual_seed(members * numel)
    return [torch.randn(numel, generator=generator) for _ in range(members)]


class Faulty:
    """In place of a link's sending pipe: does ``fault`` with the second part."""

    def __init__(self, pipe, fault):
        self._pipe, self._fault, self._parts = pipe, fault, 0
        self.over = threading.Event()

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def send(self, head, data, is_closed):
        header = Header.from_bytes(head)
        self._parts += header.kind is Kind.PART
        if self._parts == 2 and header.kind is Kind.PART:
            self._fault(self, header, bytes(data), is_closed)
        else:
            self._pipe.send(head, data, is_closed)


def resets(faulty, header, data, is_closed):
    faulty._pipe._stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(faulty._pipe._stream.sock.detach())


def stalls(faulty, header, data, is_closed):
    faulty.over.wait(30)


def sends_garbage(faulty, header, data, is_closed):
    faulty._pipe.send(b"\xff" * HEADER_BYTES, os.urandom(10_000), is_closed)


def sends_half(faulty, header, data, is_closed):
    half = Header(header.kind, header.group, header.length // 2, header.stage, header.index)
    faulty._pipe.send(half.to_bytes(), data[: header.length // 2], is_closed)


def sends_twice(faulty, header, data, is_closed):
    for _ in range(2):
        faulty._pipe.send(header.to_bytes(), data, is_closed)


def sends_not_a_number(faulty, header, data, is_closed):
    faulty._pipe.send(header.to_bytes(), torch.full((len(data) // 4,), float("nan")).numpy().tobytes(), is_closed)


def announces_a_gigabyte(faulty, header, data, is_closed):
    head = bytearray(header.to_bytes())
    head[8:12] = (2**30).to_bytes(4)
    faulty._pipe.send(bytes(head), data, is_closed)


FAULTS = [resets, stalls, sends_garbage, sends_half, sends_twice, sends_not_a_number, announces_a_gigabyte]


@pytest.mark.parametrize("transport", ["auto", "direct-plain"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_member_fails_the_round_for_all_and_the_next_goes_on_without_it(fault, transport):
    vectors = make_vectors(3)

    async def run():
        async with Nodes(3, transport=transport, part_timeout_s=2.0) as nodes:
            first = await nodes.average(vectors)
            assert {result.verdict.outcome for result in first} == {Outcome.AVERAGED}
            victim = nodes.nodes[VICTIM]
            link = victim.paths.links.find(nodes.nodes[0].peer_id)
            link.outgoing = Faulty(link.outgoing, fault)
            second = await nodes.average(vectors)
            link.outgoing.over.set()
            others = nodes.nodes[:VICTIM]
            group = make_group_of({node.peer_id: node.offer() for node in others})
            third = await asyncio.gather(*(n.average(group, v) for n, v in zip(others, vectors, strict=False)))
            return str(victim.peer_id), second, third

    name, second, third = asyncio.run(run())
    assert {result.verdict.outcome for result in second} == {Outcome.INCOMPLETE}
    assert all(result.verdict.average is None for result in second)
    assert second[0].verdict.culprits == (VICTIM,), second
    for result in second[:VICTIM]:
        assert name[-8:] in result.verdict.reason, result.verdict
    assert 1 not in second[0].verdict.culprits
    assert {result.verdict.outcome for result in third} == {Outcome.AVERAGED}, third
    assert len(digests([result.verdict.average for result in third])) == 1


def test_a_member_at_a_megabyte_per_second_is_named_when_time_is_up():
    vectors = make_vectors(3, 32 * PART_ELEMENTS)

    async def run():
        async with Nodes(3, part_timeout_s=3.0) as nodes:
            first = await nodes.average(vectors)
            assert {result.verdict.outcome for result in first} == {Outcome.AVERAGED}
            slow = nodes.nodes[VICTIM]
            bucket = TokenBucket(1e6)
            for (link,) in slow.paths.links._links.values():
                link.outgoing._bucket = bucket
            timeouts = (6.0, 6.5, 9.0)
            group = nodes.group()
            return str(slow.peer_id), await asyncio.gather(
                *(n.average(group, v, timeout_s=t) for n, v, t in zip(nodes.nodes, vectors, timeouts, strict=True))
            )

    name, results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.INCOMPLETE}
    for result in results[:VICTIM]:
        assert name[-8:] in result.verdict.reason, result.verdict
    assert results[0].verdict.culprits == (VICTIM,), [result.verdict for result in results]


@pytest.mark.parametrize("transport", ["auto", "direct-plain"])
def test_an_upload_limit_is_kept_within_five_percent(transport):
    limit_mbit_s, vectors = 80, make_vectors(2, 30 * PART_ELEMENTS)

    async def run():
        async with Nodes(2, transport=transport, upload_mbit_s=limit_mbit_s) as nodes:
            start = time.monotonic()
            results = await nodes.average(vectors)
            return results, time.monotonic() - start

    results, taken_s = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
    line_s = results[0].verdict.bytes_sent * 8 / (limit_mbit_s * 1e6)
    assert 0.95 * line_s <= taken_s
    assert taken_s <= 1.3 * line_s  # the first part waits for nothing, the last average for the last part


def test_a_bucket_lets_through_what_its_limit_says():
    now = 0.0
    bucket = TokenBucket(1000.0, lambda: now)
    sent = 0
    while now < 100:
        now += bucket.reserve(37) + 0.0003
        sent += 37
    assert sent == pytest.approx(1000 * 100, rel=0.01)


# Blame


LIVE = ["a", "b", "c"]


def rounds_without(blame, peer_id):
    """Rounds in a row, from the next one, that leave a peer out."""
    return next(rounds for rounds in range(100) if peer_id not in blame.next_round(LIVE, 2))


def test_blame_counts_for_two_rounds_and_twice_as_many_after_each_further_fault():
    blame, counts = Blame(), []
    for _ in range(8):
        blame.add("a")
        counts.append(rounds_without(blame, "a"))
    assert counts == [2, 4, 8, 16, 32, 64, 64, 64]


def test_a_fault_is_made_up_for_by_ten_rounds_together():
    blame = Blame()
    for good_rounds, next_count in ((9, 4), (0, 8), (10, 8), (30, 2)):
        blame.add("a")
        rounds_without(blame, "a")
        for _ in range(good_rounds):
            blame.atone(["a", "b"])
        probe = copy.deepcopy(blame)
        probe.add("a")
        assert rounds_without(probe, "a") == next_count


def test_a_round_together_lets_a_peer_in_again():
    blame = Blame()
    blame.add("a")
    assert blame.next_round(LIVE, 2) == {"a"}
    blame.atone(["a"])
    assert blame.next_round(LIVE, 2) == frozenset()


def test_nobody_is_left_out_where_the_others_would_be_no_quorum():
    blame = Blame()
    blame.add("a")
    assert blame.next_round(["a", "b"], 2) == frozenset()
    blame.add("b")
    assert blame.next_round(LIVE, 2) == frozenset()


# What comes from the network


@settings(max_examples=500)
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES) | st.binary(max_size=60))
def test_a_header_is_parsed_or_refused_and_never_else(data):
    try:
        header = Header.from_bytes(data)
    except FrameError:
        return
    assert header.length <= MAX_PART_BYTES
    assert header.to_bytes() == data


@settings(max_examples=300)
@given(
    kind=st.integers(0, 8), stage=st.integers(0, 255), reserved=st.sampled_from([0, 0, 1]),
    index=st.integers(0, 2**32 - 1), length=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_a_header_that_announces_too_much_is_refused(kind, stage, reserved, index, length):
    data = struct.pack(">BBHII32s", kind, stage, reserved, index, length, b"g" * 32)
    try:
        header = Header.from_bytes(data)
    except FrameError:
        return
    assert (header.kind, header.stage, header.index, header.length) == (kind, stage, index, length)
    assert header.length <= (MAX_PART_BYTES if kind in (Kind.PART, Kind.AVERAGE) else 32 + 34 * 1024)


@settings(max_examples=500)
@given(st.binary(max_size=MAX_CONTACT_BYTES + 5))
def test_a_contact_is_parsed_or_refused_and_never_else(data):
    try:
        contact = Contact.from_bytes(data)
    except ValueError:
        return
    assert contact.to_bytes() == data
    assert len(contact.addresses) <= 3


def test_loopback_addresses_of_others_are_dialled_only_from_loopback():
    local = Contact.from_bytes(b"\x01\x00\x1f\x90" + b"\x04\x7f\x00\x00\x01")
    public = Contact.from_bytes(b"\x01\x00\x1f\x90" + b"\x04\x08\x08\x08\x08")
    anywhere = Contact.from_bytes(b"\x01\x00\x1f\x90" + b"\x04\x00\x00\x00\x00" + b"\x04\xe0\x00\x00\x01")
    assert local.dialable(local) == [("127.0.0.1", 8080)]
    assert local.dialable(public) == []
    assert public.dialable(local) == [("8.8.8.8", 8080)]
    assert anywhere.dialable(local) == []
