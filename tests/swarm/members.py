"""Rounds without a network: members that talk through in-memory streams, and ways to misbehave in them."""

import asyncio
import os
from contextlib import aclosing

import torch
from hivemind.averaging.group_info import GroupInfo
from hivemind.p2p import PeerID

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.compression import Plain
from hivetrain.averaging.exchange import Exchange, over_streams
from hivetrain.averaging.group import Group, Offer
from hivetrain.averaging.layout import Layout
from hivetrain.averaging.reduction import ExchangeError
from hivetrain.averaging.round import Round
from hivetrain.averaging.staged import StagedExchange
from hivetrain.averaging.transport import Channel

FINGERPRINT, DIGEST = b"f" * 16, b"d" * 16


def make_peer_id():
    return PeerID(b"\x12\x20" + os.urandom(32))


def make_offer(samples=10, epoch=0, digest=DIGEST, fingerprint=FINGERPRINT, bandwidth=1.0, links=b""):
    return Offer(fingerprint, epoch, digest, samples, bandwidth, os.urandom(8), links=links)


def make_group(offers):
    return make_group_of({make_peer_id(): offer for offer in offers})


def make_group_of(offers):
    return Group.from_matchmaking(
        GroupInfo(os.urandom(20), tuple(offers), tuple(offer.to_bytes() for offer in offers.values()))
    )


def make_exchanges(vectors, weights, sizes, codec="none", part_timeout_s=5.0):
    layout = Layout.split(vectors[0].numel(), sizes)
    return [
        Exchange(me, weights, layout, vector, make_codec(codec), part_timeout_s) for me, vector in enumerate(vectors)
    ]


async def run_exchanges(exchanges, behave=None):
    """Runs all members; ``behave`` maps (sender, receiver) to a function that changes what the sender's stream says."""
    behave = behave or {}

    def opener(me):
        async def open_stream(member, parts):
            said = behave.get((me, member), lambda stream: stream)(parts)
            async with aclosing(exchanges[member].serve(me, said)) as answers:
                async for answer in answers:
                    yield answer

        return open_stream

    runs = (exchange.run(over_streams(opener(me))) for me, exchange in enumerate(exchanges))
    return await asyncio.gather(*runs, return_exceptions=True)


async def run_rounds(
    group, vectors, behave=None, ballots=None, absent=(), vote_timeout_s=1.0, timeout_s=5.0, answer=None
):
    """Runs all members' rounds but those of ``absent``; ``ballots`` maps (sender, receiver) to what is said instead.

    ``behave`` and ``answer`` map (sender, reducer) to functions that change the stream of parts, and that of averages.
    """
    ballots = ballots or {}

    def member_exchange(me):
        def layout(numel):
            return Layout.split(numel, group.slices(numel))

        stages = Plain(make_codec("none")).stages(vectors[me], 0)
        return StagedExchange(me, group.weights(2**53), layout, stages, make_codec("none"), vote_timeout_s)

    exchanges = [member_exchange(me) for me in range(len(vectors))]
    rounds = [Round(group, me, exchange, vote_timeout_s) for me, exchange in enumerate(exchanges)]

    class InMemory(Channel):
        name = "memory"

        def __init__(self, me, member):
            self.me, self.member = me, member

        async def exchange(self, stage, exchange):
            await exchange.talk_over(lambda _, parts: open_stream(self.me, stage, self.member, parts), self.member)

        async def vote(self, ballot):
            return await send_ballot(self.me, self.member, ballot)

    async def open_stream(me, stage, member, parts):
        if member in absent:
            raise ExchangeError("cannot be dialled")
        said = (behave or {}).get((me, member), lambda stream: stream)(parts)
        async with aclosing(exchanges[member].serve(stage, me, said)) as answers:
            async for average in (answer or {}).get((me, member), lambda stream: stream)(answers):
                yield average

    async def send_ballot(me, member, ballot):
        said = ballots.get((me, member), ballot)
        if said is None or member in absent:
            raise ExchangeError("lost on the way")
        try:
            theirs = await rounds[member].answer_ballot(me, said)
        except TimeoutError:
            raise ExchangeError("no answer") from None
        theirs = ballots.get((member, me), theirs)
        if theirs is None:
            raise ExchangeError("lost on the way")
        return theirs

    present = [me for me in range(len(rounds)) if me not in absent]
    channels = {me: {other: InMemory(me, other) for other in range(len(rounds)) if other != me} for me in present}
    return await asyncio.gather(*(rounds[me].run(channels[me], timeout_s) for me in present))


def digests(results):
    assert all(isinstance(result, torch.Tensor) for result in results), results
    return {result.numpy().tobytes() for result in results}
