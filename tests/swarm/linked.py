"""Peers of one process whose rounds go over real direct links on loopback, and over in-memory streams beside them."""

import asyncio
from contextlib import aclosing
from types import SimpleNamespace

from cryptography.hazmat.primitives.asymmetric import rsa
from members import make_group_of, make_offer

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.compression import Plain
from hivetrain.averaging.direct.bucket import TokenBucket
from hivetrain.averaging.direct.options import DirectOptions
from hivetrain.averaging.memory import ResultMemory
from hivetrain.averaging.reduction import ExchangeError
from hivetrain.averaging.round import Round, RoundTable
from hivetrain.averaging.rules import RULES
from hivetrain.averaging.staged import StagedExchange
from hivetrain.swarm.identity import Identity

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
PART_TIMEOUT_S = 4.0


def make_identity():
    return Identity(rsa.generate_private_key(public_exponent=65537, key_size=2048))


class Streams:
    """What the libp2p service is to the paths, in memory."""

    def __init__(self, node, net):
        self.node, self.net, self.on_declined, self.declined, self.streams = node, net, None, 0, 0

    async def decline(self, group, peer_id):
        self.declined += 1
        self.net[peer_id].service.on_declined(group, self.node.peer_id)

    async def open_stream(self, group_and_stage, peer_id, parts):
        self.streams += 1
        round_, member = await self.net[peer_id].rounds.find(group_and_stage[:-1], self.node.peer_id)
        async with aclosing(round_.exchange.serve(group_and_stage[-1], member, parts)) as answers:
            async for answer in answers:
                yield answer

    async def send_ballot(self, group, peer_id, ballot):
        round_, member = await self.net[peer_id].rounds.find(group, self.node.peer_id)
        try:
            return await round_.answer_ballot(member, ballot)
        except TimeoutError:
            raise ExchangeError("no answer") from None


class Node:
    """One peer."""

    def __init__(
        self, net, identity, transport="auto", upload_mbit_s=None, maddrs=LOOPBACK, part_timeout_s=PART_TIMEOUT_S
    ):
        self.identity, self.peer_id, self.part_timeout_s = identity, identity.peer_id, part_timeout_s
        self.rounds, self.service = RoundTable(), Streams(self, net)
        self.memory = ResultMemory()
        bucket = None if upload_mbit_s is None else TokenBucket(upload_mbit_s * 1e6 / 8)
        self.options = DirectOptions(transport, self.peer_id, identity, maddrs, LOOPBACK)
        self.paths = self.options.open("run", self.service, self.rounds, part_timeout_s, bucket, client_mode=False)
        net[self.peer_id] = self

    def offer(self, samples=10):
        return make_offer(samples, links=self.paths.contact.to_bytes())

    async def average(self, group, vector, codec="none", rule="mean", timeout_s=30.0):
        """Takes part in a round; returns the verdict and which way it took to each member."""
        me = group.peer_ids.index(self.peer_id)
        stages = Plain(make_codec(codec)).stages(vector, 0)
        weights = group.weights(2**53)
        exchange = StagedExchange(
            me, weights, group.layout, stages, make_codec(codec), self.part_timeout_s, RULES[rule], self.memory
        )
        round_ = Round(group, me, exchange, self.part_timeout_s)
        await self.rounds.add(round_)
        channels = self.paths.channels(group, me)
        try:
            verdict = await round_.run(channels, timeout_s)
        finally:
            self.rounds.forget(round_, 1.0)
            self.paths.leave(group, channels)
        return SimpleNamespace(verdict=verdict, ways={member: channel.name for member, channel in channels.items()})


class Nodes:
    """Some peers, closed in the end. To be used inside a running event loop."""

    def __init__(self, count, **options):
        self.net, self.count, self.options = {}, count, options

    async def __aenter__(self):
        self.nodes = [Node(self.net, identity, **self.options) for identity in identities(self.count)]
        return self

    async def __aexit__(self, *_):
        await asyncio.gather(*(node.paths.stop() for node in self.nodes))

    def group(self, samples=None):
        offers = [node.offer(n) for node, n in zip(self.nodes, samples or [10] * self.count, strict=True)]
        return make_group_of({node.peer_id: offer for node, offer in zip(self.nodes, offers, strict=True)})

    async def average(self, vectors, group=None, **options):
        group = group or self.group()
        return await asyncio.gather(
            *(node.average(group, vector, **options) for node, vector in zip(self.nodes, vectors, strict=True))
        )


_known = []


def identities(count):
    """The first of a few keys that are made once: making one takes a tenth of a second."""
    while len(_known) < count:
        _known.append(make_identity())
    return _known[:count]
