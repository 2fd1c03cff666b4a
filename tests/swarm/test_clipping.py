"""Clipping: torch's result, and the same bits in whatever order a machine adds."""

import pytest
import torch

from hivetrain.strategies.clipping import clip_by_norm


def make_params(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (300, 7, 5000)]
    for param in params:
        param.grad = (scale * torch.randn(param.numel(), generator=generator)).to(dtype)
    return params


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_are_scaled_as_by_torch(max_norm):
    ours, theirs = make_params(), make_params()
    norm = clip_by_norm(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=0)


def test_the_order_of_addition_does_not_change_a_bit():
    plain, shuffled = make_params(), make_params()
    orders = [torch.randperm(param.numel()) for param in shuffled]
    for param, order in zip(shuffled, orders, strict=True):
        param.grad = param.grad[order]
    clip_by_norm(plain, 0.5)
    clip_by_norm(shuffled[::-1], 0.5)
    for own, other, order in zip(plain, shuffled, orders, strict=True):
        assert torch.equal(own.grad[order], other.grad)


def test_params_without_gradients_are_left_alone():
    assert clip_by_norm([torch.nn.Parameter(torch.ones(3))], 1.0) == 0.0
