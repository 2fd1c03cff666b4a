"""Another peer's state puts a module and its optimizer exactly where that peer is, whatever the optimizer keeps."""

import pytest
import torch
from solo import distance, net, samples

from hivetrain.averaging.state import load_snapshot, params_digest, take_snapshot

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "groups": lambda params: torch.optim.AdamW(
        [{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], amsgrad=True
    ),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True),
    "adafactor": lambda params: torch.optim.Adafactor(params),
}


def train(module, optimizer, steps):
    x, y = samples(8)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


def with_norm(seed, dtype):
    return torch.nn.Sequential(net(seed), torch.nn.BatchNorm1d(1)).to(dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_peer_that_loads_a_state_goes_on_bit_for_bit_as_its_donor(name):
    donor, heir = with_norm(0, torch.float32), with_norm(1, torch.float32)
    ours, theirs = (OPTIMIZERS[name](list(module.parameters())) for module in (heir, donor))
    train(donor, theirs, 3)
    train(heir, ours, 5)
    load_snapshot(take_snapshot(donor, theirs, 3, params_digest(donor)), heir, ours)
    assert params_digest(heir) == params_digest(donor)
    assert torch.equal(heir[1].running_mean, donor[1].running_mean)
    train(donor, theirs, 3)
    train(heir, ours, 3)
    assert params_digest(heir) == params_digest(donor)
    assert distance(donor, with_norm(0, torch.float32)) > 0
