"""Gradients of many microbatches, summed with exact sample weights until the swarm's global batch is full.

Sums are kept in one flat fp32 vector on the params' device whatever the params' dtype, so neither the order of
microbatches nor bf16 params lose samples to rounding.
"""

from collections.abc import Iterable

import torch


class GradientAccumulator:
    """Sum over microbatches of (samples x mean gradient), and the number of samples in it.

    Args:
        params: the trainable params, in an order that is equal on all peers. All on one device.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter]) -> None:
        self.params = [param for param in params if param.requires_grad]
        if not self.params:
            raise ValueError("the optimizer has no trainable params")
        sizes = [param.numel() for param in self.params]
        self._sum = torch.zeros(sum(sizes), dtype=torch.float32, device=self.params[0].device)
        self._views = [view.view_as(param) for view, param in zip(self._sum.split(sizes), self.params, strict=True)]
        self.numel = self._sum.numel()
        self.shapes = [param.shape for param in self.params]
        self.samples = 0

    @torch.no_grad()
    def add(self, samples: int) -> None:
        """Adds the params' ``.grad``, a mean over ``samples`` samples. Params without a gradient count as zero."""
        pairs = [(view, p.grad) for view, p in zip(self._views, self.params, strict=True) if p.grad is not None]
        if pairs:
            views, grads = zip(*pairs, strict=True)
            torch._foreach_add_(list(views), [grad.to(torch.float32) for grad in grads], alpha=samples)
        self.samples += samples

    def mean(self) -> torch.Tensor:
        """The sample-weighted mean gradient, shape (n,), a new fp32 tensor on CPU; pinned if it comes from a GPU."""
        mean = self._sum / max(1, self.samples)
        if not mean.is_cuda:
            return mean
        pinned = torch.empty(mean.shape, dtype=mean.dtype, pin_memory=True)
        return pinned.copy_(mean)

    @torch.no_grad()
    def add_back(self, gradient: torch.Tensor, samples: int) -> None:
        """Adds a flat mean gradient over ``samples`` samples, as :meth:`mean` returned it before a :meth:`reset`."""
        self._sum.add_(gradient.to(self._sum.device), alpha=samples)
        self.samples += samples

    @torch.no_grad()
    def put(self, gradient: torch.Tensor) -> None:
        """Writes a flat gradient, shape (n,), into the params' ``.grad``."""
        parts = gradient.to(self._sum.device).split([param.numel() for param in self.params])
        for param, part in zip(self.params, parts, strict=True):
            param.grad = part.view_as(param).to(param.dtype)

    def reset(self) -> None:
        """Forgets everything: after a global update, or when the gradients are of params that are no longer held."""
        self._sum.zero_()
        self.samples = 0

    def state_dict(self) -> dict[str, object]:
        return {"sum": self._sum.cpu().clone(), "samples": self.samples}

    def load_state_dict(self, state: dict[str, object]) -> None:
        total, samples = state["sum"], state["samples"]
        assert isinstance(total, torch.Tensor)
        assert isinstance(samples, int)
        self._sum.copy_(total)
        self.samples = samples
