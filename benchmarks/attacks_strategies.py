"""What the miners of the simulation do: honest work, and one function for each attack.

The surprising fact: an attack is little more than what is put into the log of microbatches.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import msgpack
import torch
from attacks_miners import EXPIRES, Claim, Miner, mean_gradient, mean_loss, usual_loss
from attacks_swarm import START, Microbatch, Position, Swarm

from hivetrain.contribution.envelope import seal_envelope
from hivetrain.contribution.record import MAX_RECORD_BYTES, Contribution, work_key
from hivetrain.contribution.sketch import sketch_bytes, sketch_vector
from hivetrain.validator.config import ScoringOptions

HUGE_BYTES = 1_000_000
FALSE_LOSS = 9.9
HIT_ROUNDS = 3  # what goes unseen, n * 0.75^n rounds, is most for 3 and 4


def honest(miner: Miner, swarm: Swarm) -> Claim:
    """Computes what it was given, and says so."""
    done = miner.own_work(swarm)
    return Claim(done, mean_gradient(done), mean_loss(done))


def free_rider(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing; random sketches."""
    done = miner.invented(swarm)
    return Claim(done, mean_gradient(done), usual_loss(swarm))


def lazy(miner: Miner, swarm: Swarm) -> Claim:
    """Computes one sequence and claims all."""
    places = miner.own_places(swarm)
    batch, _ = swarm.reader.batch(miner.slot, START, places[0][1], 1)
    loss, gradient = swarm.gradient(batch)
    sketch = swarm.sketcher.sketch_flat(gradient)
    return Claim([Microbatch(*place, loss, gradient, sketch) for place in places], gradient, loss)


def lazy_sequence(miner: Miner, swarm: Swarm) -> Claim:
    """Computes the first sequence of each microbatch and lets it stand for the whole microbatch."""
    done = []
    for position, consumed in miner.own_places(swarm):
        batch, _ = swarm.reader.batch(miner.slot, START, consumed, 1)
        loss, gradient = swarm.gradient(batch)
        done.append(Microbatch(position, consumed, loss, gradient, swarm.sketcher.sketch_flat(gradient)))
    return Claim(done, mean_gradient(done), mean_loss(done))


def stale(miner: Miner, swarm: Swarm) -> Claim:
    """Computes its data on the params of the round before."""
    done = []
    for position, consumed in miner.own_places(swarm):
        batch, _ = swarm.reader.batch(miner.slot, START, consumed, swarm.economy.batch_size)
        loss, gradient = swarm.stale_gradient(batch)
        done.append(Microbatch(position, consumed, loss, gradient, swarm.sketcher.sketch_flat(gradient)))
    return Claim(done, mean_gradient(done), mean_loss(done))


def copied(miner: Miner, swarm: Swarm) -> Claim:
    """Signs the work of an honest friend, who gives it everything, as its own."""
    theirs = swarm.work(0, swarm.epoch * swarm.economy.samples, swarm.economy.microbatches)
    done = _at(miner.own_places(swarm), theirs)
    return Claim(done, mean_gradient(done), mean_loss(done))


def replayed(miner: Miner, swarm: Swarm) -> Claim:
    """Works once, in the first round, and signs that again under each later epoch and its places."""
    miner.kept = miner.kept or miner.own_work(swarm)
    done = _at(miner.own_places(swarm), miner.kept)
    return Claim(done, mean_gradient(done), mean_loss(done))


def resent(miner: Miner, swarm: Swarm) -> Claim:
    """Works once, in the first round, and publishes the very bytes of that record again and again."""
    claim = honest(miner, swarm)
    return replace(claim, garbage=miner.first_sealed) if miner.first_sealed else claim


def same_data(miner: Miner, swarm: Swarm) -> Claim:
    """Computes on the current params, but always the blocks of its first round."""
    done = swarm.work(miner.slot, 0, swarm.economy.microbatches)
    return Claim(done, mean_gradient(done), mean_loss(done))


def easy_data(miner: Miner, swarm: Swarm) -> Claim:
    """Looks at microbatches of several other slots and claims the one with the lowest loss as its own."""
    consumed = swarm.epoch * swarm.economy.samples
    found = min((swarm.microbatch(slot, consumed) for slot in range(4)), key=lambda done: done.loss)
    done = _at(miner.own_places(swarm), [found] * swarm.economy.microbatches)
    return Claim(done, found.gradient, found.loss)


def over_claim(miner: Miner, swarm: Swarm) -> Claim:
    """Computes its share and claims ten times as much."""
    return _repeated(miner, swarm, times=10)


def largest_claim(miner: Miner, swarm: Swarm) -> Claim:
    """The same with as many samples as validators let in."""
    return _repeated(miner, swarm, times=_most_times(swarm))


def billionfold_claim(miner: Miner, swarm: Swarm) -> Claim:
    """Claims a billion times its samples; signs by itself what the record's constructor refuses."""
    done = miner.own_work(swarm)
    samples = 10**9 * swarm.economy.samples
    head = [swarm.economy.run_id, miner.address, miner.peer_id, swarm.epoch, swarm.digest]
    zeros = [0, 0, 0, 0]
    body = [swarm.economy.rules.fingerprint, 0, zeros, zeros, samples // 2, 2, samples, samples, bytes(1024), bytes(32)]
    payload = msgpack.packb([*head, *body, "32-true"])
    key = work_key(swarm.economy.run_id, swarm.epoch)
    signed = seal_envelope("contribution", key, payload, miner.hotkey, EXPIRES, {"contribution": MAX_RECORD_BYTES})
    return Claim(done, mean_gradient(done), mean_loss(done), garbage=signed)


def inflated(miner: Miner, swarm: Swarm) -> Claim:
    """Sends its gradient times 100, and commits to the sketch of that."""
    return _scaled(miner, swarm, 100.0)


def flipped(miner: Miner, swarm: Swarm) -> Claim:
    """Sends its gradient with the opposite sign, and commits to the sketch of that."""
    return _scaled(miner, swarm, -1.0)


def hit_and_run(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing; takes part in few rounds of each tempo, so that it is seldom drawn."""
    return free_rider(miner, swarm) if swarm.epoch % swarm.economy.tempo_rounds < HIT_ROUNDS else away(swarm)


def huge_hit_and_run(miner: Miner, swarm: Swarm) -> Claim:
    """Claims as much as validators let in, once in each tempo, and stays away otherwise."""
    return away(swarm) if swarm.epoch % swarm.economy.tempo_rounds else largest_claim(miner, swarm)


def sleeper(miner: Miner, swarm: Swarm) -> Claim:
    """Works honestly for one tempo, to be trusted, and then takes part in few rounds of each and computes nothing."""
    return (honest if swarm.epoch < swarm.economy.tempo_rounds else hit_and_run)(miner, swarm)


def honest_but_few(miner: Miner, swarm: Swarm) -> Claim:
    """Works honestly, and computes nothing in few rounds of each tempo."""
    return (free_rider if swarm.epoch % swarm.economy.tempo_rounds < HIT_ROUNDS else honest)(miner, swarm)


def honest_but_once(miner: Miner, swarm: Swarm) -> Claim:
    """Works honestly, and claims as much as validators let in at the end of each tempo."""
    tempo = swarm.economy.tempo_rounds
    return _repeated(miner, swarm, times=1 if (swarm.epoch + 1) % tempo else _most_times(swarm))


def away(swarm: Swarm) -> Claim:
    """Not there."""
    return Claim([], torch.zeros_like(swarm.theta), None)


def no_reveal(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing, and keeps silent when it is drawn."""
    return replace(free_rider(miner, swarm), reveals=False)


def late(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing until the beacon is known; the record then says that it was made before."""
    return replace(free_rider(miner, swarm), blocks_late=swarm.economy.rules.beacon_lag + 1)


def early(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing, commits when the others begin to work, and offers what it sees its beacon spare."""
    lag = swarm.economy.rules.beacon_lag
    return replace(
        free_rider(miner, swarm), blocks_late=-lag, change=lambda record: replace(record, block=record.block - lag - 1)
    )


def split(miner: Miner, swarm: Swarm, hotkeys: int = 3) -> Claim:
    """One of several hotkeys that share one machine: computes its part of an honest miner's work, honestly."""
    done = miner.own_work(swarm, swarm.economy.microbatches // hotkeys)
    return Claim(done, mean_gradient(done), mean_loss(done))


def false_reporter(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing, and tells the same false loss as its friends."""
    return replace(free_rider(miner, swarm), loss=FALSE_LOSS)


def idle(miner: Miner, swarm: Swarm) -> Claim:
    """Attends the exchange with zeros and commits to nothing."""
    return Claim([], torch.zeros_like(swarm.theta), usual_loss(swarm))


def malformed(miner: Miner, swarm: Swarm) -> Claim:
    """Publishes noise as its record."""
    noise = torch.randint(256, (2000,), generator=miner.random).to(torch.uint8).numpy().tobytes()
    return Claim([], torch.zeros_like(swarm.theta), None, garbage=noise)


def huge(miner: Miner, swarm: Swarm) -> Claim:
    """Publishes a megabyte as its record."""
    return Claim(
        [], torch.zeros_like(swarm.theta), None, garbage=msgpack.packb(["contribution", os.urandom(HUGE_BYTES)])
    )


def unknown_precision(miner: Miner, swarm: Swarm) -> Claim:
    """Computes nothing, and says that it works in a precision that nobody can replay."""
    return replace(free_rider(miner, swarm), change=lambda record: replace(record, precision="4-bit"))


def other_bytes_inflated(miner: Miner, swarm: Swarm) -> Claim:
    """Commits honestly, and sends its gradient times 100."""
    claim = honest(miner, swarm)
    return replace(claim, sent=100.0 * claim.sent)


def other_bytes_flipped(miner: Miner, swarm: Swarm) -> Claim:
    """Commits honestly, and sends its gradient with the opposite sign."""
    claim = honest(miner, swarm)
    return replace(claim, sent=-claim.sent)


def false_total(miner: Miner, swarm: Swarm) -> Claim:
    """Sends its gradient times 100; the total in its record says so, the leaves do not."""
    claim = honest(miner, swarm)

    def change(record: Contribution) -> Contribution:
        return replace(record, total=sketch_bytes(100.0 * sketch_vector(record.total)))

    return replace(claim, sent=100.0 * claim.sent, change=change)


def _repeated(miner: Miner, swarm: Swarm, times: int) -> Claim:
    """Computes its share and claims it so many times, the copies at the places that follow; goes on behind them."""
    economy = swarm.economy
    done = swarm.work(miner.slot, miner.consumed, economy.microbatches)
    places = miner.places(swarm, miner.consumed, times * len(done))
    miner.consumed += times * economy.samples
    return Claim(_at(places, done * times), mean_gradient(done), mean_loss(done))


def _most_times(swarm: Swarm) -> int:
    return ScoringOptions().most_targets * swarm.economy.target_batch_size // swarm.economy.samples


def _at(places: Sequence[tuple[Position, int]], done: Sequence[Microbatch]) -> list[Microbatch]:
    """The same results, said to be of other places."""
    return [
        replace(each, position=position, consumed=consumed)
        for (position, consumed), each in zip(places, done, strict=True)
    ]


def _scaled(miner: Miner, swarm: Swarm, factor: float) -> Claim:
    done = miner.own_work(swarm)
    scaled = [replace(each, gradient=factor * each.gradient, sketch=factor * each.sketch) for each in done]
    return Claim(scaled, mean_gradient(scaled), mean_loss(done))
