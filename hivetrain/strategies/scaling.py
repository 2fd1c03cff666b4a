"""Undoes fp16's loss scale for one microbatch, so that only true gradients are summed and averaged.

The scale is each peer's own affair: it never leaves the peer, and peers of different precision may train together.
"""

import torch
from lightning.pytorch.plugins.precision import Precision


def unscale(precision: Precision, optimizer: torch.optim.Optimizer) -> bool:
    """Divides the loss scale out of the params' ``.grad`` and adapts the scale. Returns whether all are finite.

    One infinite gradient in an average would ruin the params of all peers, whatever the precision.
    """
    scaler = getattr(precision, "scaler", None)
    if scaler is not None:
        scaler.unscale_(optimizer)
        scaler.update()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not grads or bool(torch.nn.utils.get_total_norm(grads).isfinite())
