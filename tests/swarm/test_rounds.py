"""Exchange, vote, groups and the rules of the swarm, without a network."""

import asyncio
import itertools
import time

import msgpack
import pytest
import torch
from hivemind.averaging.group_info import GroupInfo
from hivemind.utils import ValueWithExpiration, get_dht_time
from hypothesis import given, settings
from hypothesis import strategies as st
from members import (
    DIGEST,
    FINGERPRINT,
    digests,
    make_exchanges,
    make_group,
    make_offer,
    make_peer_id,
    run_exchanges,
    run_rounds,
)

from hivetrain.averaging.codecs import CODECS, make_codec
from hivetrain.averaging.exchange import over_streams
from hivetrain.averaging.group import MAX_OFFER_BYTES, Group, Offer
from hivetrain.averaging.layout import PART_ELEMENTS, Layout
from hivetrain.averaging.progress import MAX_RECORD_BYTES, MAX_TTL_S, Progress, ProgressBoard, SwarmView
from hivetrain.averaging.reduction import ExchangeError, Reduction
from hivetrain.averaging.report import Outcome

VICTIM = 1  # the member that misbehaves
SIZES = (PART_ELEMENTS + 17, 2 * PART_ELEMENTS, 5)  # several parts, one of them tiny


def make_vectors(members, numel):
    generator = torch.Generator().manual_seed(members * numel)
    return [torch.randn(numel, generator=generator) for _ in range(members)]


def weighted_mean(vectors, weights):
    total = sum(vector.double() * weight for vector, weight in zip(vectors, weights, strict=True))
    return (total / sum(weights)).float()


# Exchange


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ((3, 4), (1.0, 1.0)),
        ((PART_ELEMENTS + 1, 0, 7), (1.0, 2.0, 1000.0)),
        ((1, 1, 1, 1), (4.0, 3.0, 2.0, 1.0)),
        ((0, 0, 1025, 0, 2), (0.5, 8.0, 1.0, 1.0, 3.0)),
    ],
)
def test_all_members_end_with_the_same_bytes_of_the_weighted_mean(codec, sizes, weights):
    vectors = make_vectors(len(sizes), sum(sizes))

    async def run():
        exchanges = make_exchanges(vectors, weights, sizes, codec)
        return await run_exchanges(exchanges), exchanges

    results, exchanges = asyncio.run(run())
    assert len(digests(results)) == 1
    tolerance = {"none": 1e-6, "fp16": 4e-3, "int8": 8e-2}[codec]
    torch.testing.assert_close(results[0], weighted_mean(vectors, weights), rtol=0, atol=tolerance)
    assert all(exchange.traffic.elements == sum(sizes) for exchange in exchanges)
    assert sum(e.traffic.sent for e in exchanges) == sum(e.traffic.received for e in exchanges) > 0


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3000), min_size=2, max_size=5).filter(any),
    weights=st.lists(st.integers(1, 2**40), min_size=5, max_size=5),
    codec=st.sampled_from(sorted(CODECS)),
)
def test_any_split_and_weights_give_one_result(shape, weights, codec):
    vectors = make_vectors(len(shape), sum(shape))

    async def run():
        return await run_exchanges(make_exchanges(vectors, weights[: len(shape)], shape, codec))

    results = asyncio.run(run())
    assert len(digests(results)) == 1
    largest = max(vector.abs().max() for vector in vectors)
    assert (results[0] - weighted_mean(vectors, weights[: len(shape)])).abs().max() <= 0.02 * largest


async def _stops(parts):
    yield await anext(parts)


async def _sends_half(parts):
    async for part in parts:
        yield part[: len(part) // 2]


async def _sends_double(parts):
    async for part in parts:
        yield part + part


async def _repeats(parts):
    async for part in parts:
        yield part
        yield part


async def _adds_one(parts):
    async for part in parts:
        yield part
    yield part


async def _stalls(parts):
    yield await anext(parts)
    await asyncio.Event().wait()


async def _sends_not_a_number(parts):
    async for part in parts:
        yield torch.full((len(part) // 4,), float("nan")).numpy().tobytes()


@pytest.mark.parametrize("fault", [_stops, _sends_half, _sends_double, _stalls, _sends_not_a_number])
def test_a_faulty_member_makes_the_exchange_fail_for_all_and_is_named(fault):
    sizes = (3 * PART_ELEMENTS, PART_ELEMENTS, PART_ELEMENTS)
    vectors = make_vectors(3, sum(sizes))

    async def run():
        exchanges = make_exchanges(vectors, (1.0, 1.0, 1.0), sizes, part_timeout_s=1.0)
        return await asyncio.wait_for(run_exchanges(exchanges, {(VICTIM, 0): fault}), 20)

    results = asyncio.run(run())
    assert all(isinstance(result, ExchangeError) for result in results), results
    assert f"member {VICTIM}" in str(results[0]) or f"member(s) {VICTIM}" in str(results[0])


def test_a_part_too_many_changes_no_result():
    vectors = make_vectors(3, 30)

    async def run():
        exchanges = make_exchanges(vectors, (1.0, 1.0, 1.0), (10, 10, 10), part_timeout_s=1.0)
        return await run_exchanges(exchanges, {(VICTIM, 0): _adds_one})

    for result in asyncio.run(run()):  # whoever had the whole average before keeps it: the vote is still to come
        if isinstance(result, torch.Tensor):
            torch.testing.assert_close(result, weighted_mean(vectors, (1, 1, 1)))
        else:
            assert isinstance(result, ExchangeError)


def test_a_member_that_sends_through_two_streams_is_refused():
    vectors = make_vectors(2, 10)

    async def run():
        exchanges = make_exchanges(vectors, (1.0, 1.0), (5, 5))

        async def parts():
            yield vectors[1][:5].numpy().tobytes()

        async def talk():
            return [answer async for answer in exchanges[0].serve(1, parts())]

        return await asyncio.gather(talk(), talk(), run_exchanges(exchanges), return_exceptions=True)

    *_, runs = asyncio.run(run())
    assert isinstance(runs[0], ExchangeError)
    assert "twice" in str(runs[0])


@pytest.mark.parametrize("length", [0, 1, 19, 21, 10**6])
def test_an_answer_of_wrong_length_is_an_error_that_names_the_member(length):
    vectors = make_vectors(2, 10)

    async def run():
        exchange = make_exchanges(vectors, (1.0, 1.0), (5, 5), part_timeout_s=1.0)[0]

        async def open_stream(member, parts):
            async for _ in parts:
                yield bytes(length)

        await exchange.run(over_streams(open_stream))

    with pytest.raises(ExchangeError, match="member 1: none: 5 elements take 20 bytes"):
        asyncio.run(run())


def test_a_member_that_is_gone_ends_the_exchange_at_once():
    vectors = make_vectors(3, 30)

    async def run():
        exchange = make_exchanges(vectors, (1.0, 1.0, 1.0), (10, 10, 10), part_timeout_s=60.0)[0]

        async def open_stream(member, parts):
            if member == VICTIM:
                raise ExchangeError(f"member {member} is gone")
            async for _ in parts:
                await asyncio.Event().wait()
                yield b""

        start = time.monotonic()
        with pytest.raises(ExchangeError, match="member 1 is gone"):
            await asyncio.wait_for(exchange.run(over_streams(open_stream)), 30)
        return time.monotonic() - start

    assert asyncio.run(run()) < 5


def test_an_exchange_leaves_the_own_vector_alone():
    vectors = make_vectors(3, 3000)
    before = [vector.clone() for vector in vectors]

    async def run():
        await run_exchanges(make_exchanges(vectors, (1.0, 2.0, 3.0), (1000, 1000, 1000), "int8"))

    asyncio.run(run())
    assert all(torch.equal(*pair) for pair in zip(before, vectors, strict=True))


def test_a_layout_covers_every_element_once():
    layout = Layout.split(sum(SIZES), SIZES)
    parts = [part for member in range(3) for part in layout.parts(member)]
    assert parts[0][0] == 0
    assert parts[-1][1] == sum(SIZES)
    assert all(one[1] == two[0] for one, two in itertools.pairwise(parts))
    assert all(0 < stop - start <= PART_ELEMENTS for start, stop in parts)


@pytest.mark.parametrize("name", sorted(CODECS))
@given(numel=st.integers(1, 5000), extra=st.integers(-3, 3).filter(bool))
@settings(max_examples=20, deadline=None)
def test_codecs_know_their_length_and_refuse_another(name, numel, extra):
    codec = make_codec(name)
    encoded = codec.encode(torch.zeros(numel))
    assert len(encoded) == codec.size_bytes(numel)
    assert codec.decode(encoded, numel).shape == (numel,)
    with pytest.raises(ValueError, match=name):
        codec.decode(bytes(max(0, len(encoded) + extra)), numel + (1 if len(encoded) + extra < 0 else 0))


# Vote


def test_a_round_commits_the_same_average_for_all():
    group = make_group([make_offer(samples) for samples in (1, 2, 5)])
    vectors = make_vectors(3, 999)
    verdicts = asyncio.run(run_rounds(group, vectors))
    assert {verdict.outcome for verdict in verdicts} == {Outcome.AVERAGED}
    assert len(digests([verdict.average for verdict in verdicts])) == 1
    assert {verdict.fraction for verdict in verdicts} == {1.0}
    torch.testing.assert_close(verdicts[0].average, weighted_mean(vectors, (1, 2, 5)))


def test_a_lost_ballot_leaves_the_outcome_unknown_to_who_misses_it():
    group = make_group([make_offer() for _ in range(3)])
    lost = {(VICTIM, 0): None}  # nothing that member 1 says reaches member 0
    verdicts = asyncio.run(run_rounds(group, make_vectors(3, 99), ballots=lost))
    assert [verdict.outcome for verdict in verdicts] == [Outcome.UNKNOWN, Outcome.AVERAGED, Outcome.AVERAGED]
    assert verdicts[0].average is None
    assert str(group.peer_ids[VICTIM])[-8:] in verdicts[0].reason


def test_another_digest_is_a_disagreement_that_commits_nothing_at_who_sees_it():
    group = make_group([make_offer() for _ in range(3)])
    lies = {(VICTIM, 0): b"x" * 32, (VICTIM, 2): b"x" * 32}
    verdicts = asyncio.run(run_rounds(group, make_vectors(3, 99), ballots=lies))
    assert verdicts[0].outcome is verdicts[2].outcome is Outcome.DISAGREED
    assert verdicts[0].average is verdicts[2].average is None


@pytest.mark.parametrize("garbage", [b"x", b"x" * 31, b"x" * 33, b"x" * 10**6])
def test_a_ballot_of_wrong_length_counts_as_given_up(garbage):
    group = make_group([make_offer() for _ in range(2)])
    verdicts = asyncio.run(run_rounds(group, make_vectors(2, 99), ballots={(VICTIM, 0): garbage}))
    assert verdicts[0].outcome is Outcome.INCOMPLETE
    assert verdicts[0].average is None


@pytest.mark.parametrize("fault", [_stops, _sends_half, _stalls])
def test_a_failed_member_makes_the_round_incomplete_for_all(fault):
    group = make_group([make_offer() for _ in range(3)])
    vectors = make_vectors(3, 9 * PART_ELEMENTS)
    verdicts = asyncio.run(run_rounds(group, vectors, behave={(VICTIM, 0): fault}))
    assert {verdict.outcome for verdict in verdicts} == {Outcome.INCOMPLETE}
    assert all(verdict.average is None for verdict in verdicts)
    assert all(verdict.reason for verdict in verdicts)
    assert verdicts[0].fraction < 1


@pytest.mark.parametrize("fault", [_repeats, _adds_one])
def test_a_member_that_sends_too_much_does_not_divide_the_others(fault):
    group = make_group([make_offer() for _ in range(3)])
    verdicts = asyncio.run(run_rounds(group, make_vectors(3, 9 * PART_ELEMENTS), behave={(VICTIM, 0): fault}))
    assert {verdict.outcome for verdict in verdicts} in ({Outcome.INCOMPLETE}, {Outcome.AVERAGED})


def test_an_absent_member_makes_the_round_incomplete_within_its_timeouts():
    group = make_group([make_offer() for _ in range(3)])
    start = time.monotonic()
    verdicts = asyncio.run(run_rounds(group, make_vectors(3, 99), absent={VICTIM}))
    assert time.monotonic() - start < 8
    assert {verdict.outcome for verdict in verdicts} == {Outcome.INCOMPLETE}


def test_an_error_of_this_program_fails_the_round_and_blames_nobody(monkeypatch, caplog):
    def breaks(self, member, index, data):
        if self.me == VICTIM:
            raise ZeroDivisionError("a mistake")
        store(self, member, index, data)

    store = Reduction.store
    monkeypatch.setattr(Reduction, "store", breaks)
    group = make_group([make_offer() for _ in range(3)])
    verdicts = asyncio.run(run_rounds(group, make_vectors(3, 9 * PART_ELEMENTS)))
    assert {verdict.outcome for verdict in verdicts} == {Outcome.INCOMPLETE}
    assert verdicts[VICTIM].culprits == ()
    assert "log" in verdicts[VICTIM].reason
    assert "ZeroDivisionError: a mistake" in caplog.text


# Groups


def test_the_largest_set_of_like_state_is_the_group():
    offers = [make_offer(), make_offer(epoch=7), make_offer(), make_offer(digest=b"x" * 16), make_offer()]
    group = make_group(offers)
    assert group.offers == (offers[0], offers[2], offers[4])
    assert sorted(group.left_out.values()) == [
        "it is at swarm epoch 7, the group is at 0",
        "its params differ from the group's at swarm epoch 0",
    ]


def test_ties_go_to_the_higher_epoch_and_then_to_the_smaller_digest():
    assert make_group([make_offer(epoch=1), make_offer(epoch=2)]).offers[0].epoch == 2
    assert make_group([make_offer(digest=b"b" * 16), make_offer(digest=b"a" * 16)]).offers[0].digest == b"a" * 16


def test_other_run_settings_are_left_out_with_the_reason():
    group = make_group([make_offer(), make_offer(), make_offer(fingerprint=b"x" * 16)])
    assert list(group.left_out.values()) == ["its run settings differ"]


def test_garbage_offers_are_left_out():
    ids = tuple(make_peer_id() for _ in range(5))
    good = make_offer()
    gathered = (b"", good.to_bytes(), b"\xff" * 40, b"x" * 10**6, good.to_bytes())
    group = Group.from_matchmaking(GroupInfo(b"id", ids, gathered))
    assert group.peer_ids == (ids[1], ids[4])
    assert set(group.left_out) == {ids[0], ids[2], ids[3]}


def test_a_group_of_garbage_alone_has_no_members():
    group = Group.from_matchmaking(GroupInfo(b"id", (make_peer_id(),), (b"garbage",)))
    assert group.peer_ids == ()


def test_two_groups_with_one_id_have_different_names():
    offers = [make_offer(), make_offer()]
    assert make_group(offers).name != make_group(offers).name


def test_slices_follow_bandwidth_and_leave_out_who_cannot_be_dialled():
    group = make_group([make_offer(bandwidth=1.0), make_offer(bandwidth=0.0), make_offer(bandwidth=3.0)])
    assert group.slices(1000) == (250, 0, 750)
    assert make_group([make_offer(bandwidth=0.0)] * 2).slices(10) == (0, 0)


@given(st.lists(st.floats(0, 1e11), min_size=1, max_size=9), st.integers(1, 10**9))
def test_slices_cover_the_vector(bandwidths, numel):
    slices = make_group([make_offer(bandwidth=bandwidth) for bandwidth in bandwidths]).slices(numel)
    assert min(slices) >= 0
    assert sum(slices) in (0, numel)


# Claims


def make_view(records, cap=2**53):
    return SwarmView.of(records, FINGERPRINT, cap)


def record(name, epoch=0, samples=0, digest=DIGEST, fingerprint=FINGERPRINT, waiting=False):
    return Progress(name, fingerprint, epoch, samples, 1.0, digest, False, waiting)


def test_one_liar_does_not_move_the_epoch():
    for honest in range(2, 6):
        records = [record(str(i), epoch=3) for i in range(honest)]
        assert make_view([*records, record("liar", epoch=10**9)]).epoch == 3


def test_the_epoch_is_the_one_that_half_of_the_peers_have_reached():
    assert make_view([record("a", 4)]).epoch == 4
    assert make_view([record("a", 4), record("b", 5)]).epoch == 5
    assert make_view([record("a", 4), record("b", 4), record("c", 5)]).epoch == 4
    assert make_view([record("a", 4), record("b", 5), record("c", 5)]).epoch == 5
    assert make_view([]).epoch == 0


def test_samples_of_strangers_and_of_other_epochs_do_not_count():
    view = make_view(
        [record("a", 1, 10), record("b", 1, 5), record("c", 0, 7), record("d", 1, 9, fingerprint=b"x" * 16)]
    )
    assert view.samples(1) == 15
    assert [peer.peer_id for peer in view.strangers] == ["d"]


def test_samples_count_up_to_the_cap():
    records = [record(name, samples=4) for name in "abc"]
    view = make_view([*records, record("liar", samples=10**9)], cap=8)
    assert view.samples(0) == 20
    assert not view.is_full(0, 32)


def test_most_peers_waiting_makes_the_batch_full():
    def view(*waiting):
        return make_view([record(str(i), waiting=w) for i, w in enumerate(waiting)])

    assert not view(True, False).is_full(0, 100)
    assert not view(True, True, False, False).is_full(0, 100)
    assert view(True, True, False).is_full(0, 100)
    assert not make_view([record("a", 1, waiting=True), record("b", 0)]).is_full(0, 100)


def test_the_digest_is_that_of_most_peers_at_the_epoch():
    view = make_view(
        [record("a", digest=b"1"), record("b", digest=b"2"), record("c", digest=b"2"), record("d", 9, 1, b"1")]
    )
    assert view.digest == b"2"
    assert make_view([record("a", digest=b"")]).digest == b""


def test_a_quorum_is_a_majority_and_no_two_can_exist():
    for peers in range(1, 9):
        quorum = make_view([record(str(i)) for i in range(peers)]).quorum
        assert 2 * quorum > peers


# What comes from the network

_garbage = st.one_of(
    st.binary(max_size=600),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.binary(max_size=40)
        | st.text(max_size=40),
        lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=12,
    ).map(msgpack.packb),
)
_like_an_offer = st.tuples(
    st.sampled_from([FINGERPRINT, b"", b"x" * 17, "f" * 16]),
    st.sampled_from([0, -1, 2**64 - 1, 1.5, True, None]),
    st.sampled_from([DIGEST, b"", None]),
    st.sampled_from([1, 0, -5, 2**53, 2**64 - 1, True, 1.0]),
    st.sampled_from([1.0, float("nan"), float("inf"), -1.0, 1e300, 1]),
    st.sampled_from([b"n" * 8, b"", b"n" * 9]),
).map(msgpack.packb)


@settings(max_examples=300)
@given(_garbage | _like_an_offer)
def test_an_offer_is_parsed_or_refused_and_never_else(data):
    try:
        offer = Offer.from_bytes(data)
    except ValueError:
        return
    assert 0 < offer.samples < 2**53
    assert 0 <= offer.bandwidth < 1e12
    assert offer.epoch >= 0
    assert Offer.from_bytes(offer.to_bytes()) == offer
    make_group([offer]).slices(1000)


@settings(max_examples=300)
@given(_garbage | st.integers() | st.none() | st.text())
def test_a_record_is_parsed_or_refused_and_never_else(data):
    try:
        parsed = Progress.from_bytes(data)
    except ValueError:
        return
    assert Progress.from_bytes(parsed.to_bytes()) == parsed


@pytest.mark.parametrize("parse", [Offer.from_bytes, Progress.from_bytes])
def test_long_messages_are_refused_before_they_are_read(parse):
    bomb = b"\xdd\xff\xff\xff\xff" + bytes(max(MAX_OFFER_BYTES, MAX_RECORD_BYTES))  # an array of 2^32 - 1 elements
    with pytest.raises(ValueError, match="at most"):
        parse(bomb)
    with pytest.raises(ValueError, match="not a"):
        parse(bomb[:100])


def test_an_offer_and_a_record_survive_the_wire():
    offer = make_offer(samples=2**52, epoch=2**40, bandwidth=0.0)
    assert Offer.from_bytes(offer.to_bytes()) == offer
    progress = Progress("peer", FINGERPRINT, 3, 2**40, 1.5, DIGEST, True, True)
    assert Progress.from_bytes(progress.to_bytes()) == progress


def board_with(entries):
    board = ProgressBoard(None, "key", b"me", 10.0, 32, lambda peers: 2**53)
    board._own, board._as_of = record("me"), get_dht_time()
    board._merge(entries)
    return board.view(board._own)


def test_a_record_that_outlives_its_peer_for_hours_is_ignored():
    now = get_dht_time()
    seen = board_with(
        {
            b"a": ValueWithExpiration(record("honest").to_bytes(), now + 30),
            b"b": ValueWithExpiration(record("ghost").to_bytes(), now + 10 * MAX_TTL_S),
            b"c": ValueWithExpiration(record("expired").to_bytes(), now - 1),
        }
    )
    assert {peer.peer_id for peer in seen.peers} == {"me", "honest"}


def test_garbage_records_and_copies_of_the_own_are_ignored():
    later = get_dht_time() + 30
    garbage = [b"", b"x", None, 5, b"y" * 10**6, record("me", epoch=9).to_bytes(), [b"x"]]
    entries = {bytes([i]): ValueWithExpiration(value, later) for i, value in enumerate(garbage)}
    seen = board_with(entries | {b"z": "not even a record", b"me": ValueWithExpiration(record("x").to_bytes(), later)})
    assert [(peer.peer_id, peer.epoch) for peer in seen.peers] == [("me", 0)]
