"""Rules that turn the members' values into one, against attackers who are louder than everybody."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linked import Nodes
from members import digests

from hivetrain.averaging.report import Outcome
from hivetrain.averaging.rules import RULES, Clipped

PEERS, FLIPPERS, STEPS, LR = 8, 2, 600, 0.01  # a quarter of the peers


def test_no_member_counts_for_more_than_the_median_norm():
    values = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([0.0, 5.0]), 2: torch.tensor([-300.0, -400.0])}
    out = torch.empty(2)
    Clipped().reduce(values, [0.25, 0.25, 0.5], out)
    torch.testing.assert_close(out, torch.tensor([0.75 - 1.5, 1.0 + 1.25 - 2.0]))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 9), st.floats(1e-3, 1e30))
def test_one_loud_member_moves_the_result_by_no_more_than_its_share_of_an_honest_norm(members, loudness):
    generator = torch.Generator().manual_seed(members)
    values = {member: torch.randn(100, generator=generator) for member in range(members)}
    largest = max(float(v.norm()) for v in values.values())
    shares, honest, attacked = [1 / members] * members, torch.empty(100), torch.empty(100)
    Clipped().reduce(values, shares, honest)
    Clipped().reduce(values | {0: values[0] * -loudness}, shares, attacked)
    assert float(attacked.norm()) <= largest * 1.001


def samples(generator, count):
    """A regression task with noise that nobody can learn, as language has."""
    x = torch.randn(count, 6, generator=generator)
    return x, x.sin().sum(dim=1, keepdim=True) + torch.randn(count, 1, generator=generator)


def train(rule, attack):
    """Trains a small model, each step's gradient reduced from all peers' as an exchange would; returns its loss."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    params, out = list(net.parameters()), torch.empty(sum(p.numel() for p in net.parameters()))
    for step in range(STEPS):
        values = {}
        for peer in range(PEERS):
            x, y = samples(generator, 32)
            loss = torch.nn.functional.mse_loss(net(x), y)
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])
            values[peer] = -100 * gradient if attack and peer < FLIPPERS else gradient
        RULES[rule].reduce(values, [1 / PEERS] * PEERS, out)
        for param, part in zip(params, out.split([p.numel() for p in params]), strict=True):
            param.grad = part.view_as(param).clone()
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
    x, y = samples(generator, 4096)
    with torch.no_grad():
        return float(torch.nn.functional.mse_loss(net(x), y))


def test_a_quarter_of_sign_flippers_at_a_hundred_times_the_norm_costs_at_most_five_percent():
    clean = train("mean", attack=False)
    assert clean < 1.3  # learned: 1 is the noise, 3.6 the loss at the start
    assert train("clipped", attack=False) <= 1.02 * clean
    assert train("clipped", attack=True) <= 1.05 * clean
    assert train("mean", attack=True) > 2 * clean


@pytest.mark.parametrize("codec", ["none", "int8"])
def test_members_that_clip_end_with_the_same_bytes(codec):
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(400_000, generator=generator) for _ in range(3)]
    vectors.append(-100 * vectors[0])

    async def run():
        async with Nodes(4) as nodes:
            return await nodes.average(vectors, codec=codec, rule="clipped")

    results = asyncio.run(run())
    assert {result.verdict.outcome for result in results} == {Outcome.AVERAGED}
    assert len(digests([result.verdict.average for result in results])) == 1
    average = results[0].verdict.average
    assert float(average.norm()) < 1.01 * max(float(v.norm()) for v in vectors[:3])
    assert float(average @ sum(vectors[:3])) > 0
