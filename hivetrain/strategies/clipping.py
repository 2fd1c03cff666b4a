"""Gradient clipping that comes out bit-identical on all peers.

A norm in fp32 depends on how the machine adds (vector width, threads, CPU or GPU), and one last bit of it scales every
param differently. Summed in fp64 and rounded once, it is the same wherever the gradient is.
"""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision


@torch.no_grad()
def clip_by_norm(params: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scales the params' gradients in place so that their joint 2-norm is at most ``max_norm``; returns their norm."""
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return 0.0
    norm = float(sum(grad.double().square().sum().item() for grad in grads)) ** 0.5
    scale = torch.tensor(max_norm / (norm + 1e-6), dtype=torch.float32)  # as torch.nn.utils.clip_grad_norm_
    if scale < 1:
        torch._foreach_mul_(grads, scale.item())
    return norm


def use_reproducible_norm(precision: Precision) -> None:
    """Makes a precision plugin clip by :func:`clip_by_norm`."""

    def clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        clip_by_norm(precision.main_params(optimizer), clip_val)

    plugin: Any = precision
    plugin.clip_grad_by_norm = clip_grad_by_norm
