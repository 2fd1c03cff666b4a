"""Who may take part, and what a liar can reach."""

import asyncio
import time

import pytest
import torch
import worker
from hivemind.dht.crypto import RSASignatureValidator
from members import FINGERPRINT, make_exchanges, make_group, make_offer, run_exchanges
from peers import assert_one_state, assert_truthful, committed, wait_until

from hivetrain.averaging.codecs import make_codec
from hivetrain.averaging.held import HeldState
from hivetrain.averaging.options import PeerOptions
from hivetrain.averaging.peer import SwarmPeer
from hivetrain.averaging.progress import Progress, SwarmView
from hivetrain.averaging.settings import RunSettings
from hivetrain.averaging.state import params_digest, schema_of
from hivetrain.swarm import start_dht

TARGET = 32
SMALL = {"timeout": 12.0, "record_ttl": 20.0, "matchmaking": 2.0, "target": TARGET}
CLAIM = 10**9


@pytest.mark.parametrize("members", [4, 5, 8])
def test_a_claim_of_a_billion_samples_weighs_no_more_than_the_cap(members):
    cap, honest = TARGET // 4, TARGET // members
    vectors = [torch.zeros(1000) for _ in range(members - 1)] + [torch.ones(1000)]

    def average(claimed):
        group = make_group([*(make_offer(honest) for _ in range(members - 1)), make_offer(claimed)])

        async def run():
            return await run_exchanges(make_exchanges(vectors, group.weights(cap), group.slices(1000)))

        return asyncio.run(run())[0].mean().item()

    assert abs(average(CLAIM) - average(cap)) < 0.01 * average(cap)
    assert average(CLAIM) == pytest.approx(cap / (cap + (members - 1) * min(honest, cap)))


def test_a_claim_of_a_billion_samples_does_not_end_the_epoch():
    records = [Progress(name, FINGERPRINT, samples=2) for name in "abc"]
    liar = Progress("liar", FINGERPRINT, samples=CLAIM)
    view = SwarmView.of([*records, liar], FINGERPRINT, TARGET // 4)
    assert view.samples(0) == 6 + TARGET // 4
    assert not view.is_full(0, TARGET)


def test_peers_with_other_settings_are_refused_and_told_why(swarm):
    peers = swarm.start_together(2, **SMALL)
    swarm.wait_for_epoch(1)
    wrong = {
        "model": swarm.start("model", **SMALL | {"width": 9}),
        "target_batch_size": swarm.start("target", **SMALL | {"target": 33}),
        "compression": swarm.start("codec", **SMALL, options={"compression": "fp16"}),
    }
    for key, stranger in wrong.items():
        result = stranger.wait()
        assert result["error"].startswith("SettingsMismatch"), stranger.log[-2000:]
        assert f"{key} is" in result["error"]
        assert result["join_s"] <= 10
        assert result["rounds"] == []
        assert result["trained"] == 0
    results = swarm.finish(*peers)
    assert_one_state(*results)
    for one, other in zip(committed(results[0]), committed(results[1]), strict=True):
        assert one["samples"] == one["local_samples"] + other["local_samples"]
        assert one["expected_peers"] == 2


class Liar:
    """A peer that claims a far epoch and a billion samples, and serves params of its own making."""

    def __init__(self, initial_peers, run_id):
        torch.manual_seed(666)
        self.module = worker.Regression(worker.DEFAULTS["width"], 0.01, 0)
        optimizer = self.module.configure_optimizers()
        numel = sum(param.numel() for param in self.module.parameters())
        settings = RunSettings(schema_of(self.module), numel, TARGET, "none", "AdamW")
        self.digest = params_digest(self.module)
        validator = RSASignatureValidator()
        self.dht = start_dht(initial_peers.split(","), record_validators=(validator,))
        options = PeerOptions(run_id, 2.0, 12.0, 20.0, None, 1.0, False)
        held = HeldState(self.module, optimizer, 0)
        held.open()
        held.epoch = CLAIM
        codec = make_codec("none")
        self.peer = SwarmPeer(self.dht, validator.local_public_key, settings, options, codec, held)

    def __enter__(self):
        self.peer.open(give_up=lambda: False)
        self.peer.announce(CLAIM, CLAIM, 1e6, self.digest, waiting=True)
        return self

    def __exit__(self, *_):
        self.peer.close()
        self.dht.shutdown()


def test_a_liar_moves_neither_epoch_nor_params_of_those_who_join(swarm, bootstrap):
    peers = swarm.start_together(2, **SMALL)
    swarm.wait_for_epoch(1)
    with Liar(bootstrap, swarm.common["run_id"]) as liar:
        wait_until(lambda: len(liar.peer.view().peers) == 3, 30, "the liar sees the others")
        late = swarm.start("late", seed=7, **SMALL)
        started = time.monotonic()
        swarm.wait_for_epoch(1, late)
        results = swarm.finish(*peers, late)
        assert time.monotonic() - started < 120
    assert_one_state(*results)
    for result in results:
        assert_truthful(result)
        assert result["epoch"] < 1000
        assert result["digest"] != liar.digest


def test_a_retired_peer_is_not_waited_for_and_still_tells_where_the_run_is_when_it_is_the_last():
    gone = Progress("gone", FINGERPRINT, epoch=3, digest=b"d", retired=True)
    view = SwarmView.of([Progress("here", FINGERPRINT, epoch=4), gone], FINGERPRINT, TARGET)
    assert [peer.peer_id for peer in view.peers] == ["here"]
    assert view.quorum == 1
    assert SwarmView.of([gone], FINGERPRINT, TARGET).digest == b"d"
    assert Progress.from_bytes(gone.to_bytes()) == gone
