"""Memory for results, used again from round to round: to get it anew can cost as much as the exchange itself."""

import sys

import numpy as np
import torch

_FREE = 2  # references to an array that nobody else holds, as sys.getrefcount counts them: ours, and its own


class ResultMemory:
    """Keeps one array. A tensor on it, a view of that, or a memoryview each count as a use of it."""

    def __init__(self) -> None:
        self._array: np.ndarray | None = None

    def take(self, vector: torch.Tensor) -> torch.Tensor:
        """An fp32 tensor of ``vector``'s shape, (n,), with any content; pinned if ``vector`` is."""
        if vector.is_pinned():
            return torch.empty(vector.shape, pin_memory=True)  # torch keeps pinned memory itself
        if self._array is None or self._array.shape != vector.shape or sys.getrefcount(self._array) > _FREE:
            self._array = np.empty(vector.shape, dtype=np.float32)
        return torch.from_numpy(self._array)
