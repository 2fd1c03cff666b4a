"""Peers of this process with DHT nodes and links of their own: whole rounds, from matchmaking to the report."""

import time
from contextlib import ExitStack, contextmanager

import torch
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils.crypto import RSAPrivateKey

from hivetrain.averaging.compression import make_compressor
from hivetrain.averaging.direct.options import DirectOptions
from hivetrain.averaging.held import HeldState
from hivetrain.averaging.options import PeerOptions
from hivetrain.averaging.peer import SwarmPeer
from hivetrain.averaging.settings import RunSettings
from hivetrain.swarm import start_dht
from hivetrain.swarm.identity import identity_file, load_identity

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)
DIGEST = "00" * 32
MEET_S = 30.0


class Neighbour:
    """One peer. Leave it through ``stack``."""

    def __init__(
        self, stack, run_id, initial_peers, count, transport, upload_mbit_s=None, codec="none", averaging_timeout_s=60.0
    ):
        validator = RSASignatureValidator(RSAPrivateKey())  # else one for the whole process
        with identity_file(None) as path:
            dht = start_dht(initial_peers, record_validators=(validator,), identity_path=path)
            identity = load_identity(path)
        stack.callback(dht.shutdown)
        direct = None
        if transport != "libp2p":
            direct = DirectOptions(transport, identity.peer_id, identity, LOOPBACK, LOOPBACK)
        self._compressor = make_compressor(codec, [torch.Size([0])])
        self._peer = SwarmPeer(
            dht,
            validator.local_public_key,
            RunSettings("vectors", 0, count, codec, "none"),
            PeerOptions(run_id, 4.0, averaging_timeout_s, 60.0, None, 1.0, False, direct, upload_mbit_s),
            self._compressor.codec,
            HeldState(torch.nn.Module(), torch.optim.SGD([torch.zeros(1)]), 0),
        )
        self._averaging_timeout_s = averaging_timeout_s
        stack.callback(self._peer.close)
        self._peer.open(lambda: False)
        self.peer_id = self._peer.peer_id
        self.announce(0)

    def announce(self, epoch):
        self._peer.announce(epoch, 1, 1.0, DIGEST, waiting=True)

    def meet(self, count):
        deadline = time.monotonic() + MEET_S
        while len(self._peer.refresh().peers) < count:
            assert time.monotonic() < deadline, "the peers have not met"

    def start(self, vector):
        return self._peer.start_average(self._compressor, vector, 1, b"", self._peer.view(), self._averaging_timeout_s)

    def finish(self, attempt):
        return self._peer.finish_average(attempt, lambda: False)


@contextmanager
def neighbours(run_id, initial_peers, transport, uploads, **options):
    """As many peers as there are upload limits, which know each other."""
    with ExitStack() as stack:
        peers = [
            Neighbour(stack, run_id, initial_peers, len(uploads), transport, upload, **options) for upload in uploads
        ]
        for peer in peers:
            peer.meet(len(peers))
        yield peers


def average(peers, vectors, epoch=0):
    """One round of all ``peers``; returns their reports and averages."""
    for peer in peers:
        peer.announce(epoch)
    attempts = [peer.start(vector) for peer, vector in zip(peers, vectors, strict=True)]
    return [peer.finish(attempt) for peer, attempt in zip(peers, attempts, strict=True)]
