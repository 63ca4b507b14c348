"""Quantize an input once for the siblings that read it: q/k/v, gate/up.

The first sibling computes the values, the last one drops them, so nothing outlives one pass through the block; each sibling applies its
own straight-through estimator, so no graph node is shared (which breaks under activation checkpointing).
"""

import torch
from torch import Tensor

from lightning_qat.numerics.fake_quantize import straight_through
from lightning_qat.quantizers import Quantizer

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))


class SharedInput:
    """One group of siblings under the same parent with the same input spec.

    Args:
        size: How many siblings read the input.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.clear()

    def clear(self) -> None:
        """Forget the input at hand."""
        self._source: Tensor | None = None
        self._values: Tensor | None = None
        self._waiting = 0

    def quantize(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """The values of `x` on the grid; computed anew whenever a sibling brings another tensor (cross-attention)."""
        if self._source is not x:
            with torch.no_grad():
                self._source, self._values, self._waiting = x, quantizer(x), self.size
        values = self._values
        assert values is not None
        self._waiting -= 1
        if self._waiting == 0:
            self.clear()
        return straight_through(x, values)

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
