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
        self._served: list[int] = []
        self._asked = 0

    def quantize(self, quantizer: Quantizer, x: Tensor) -> Tensor:
        """The values of `x` on the grid.

        Computed anew when a sibling brings another tensor (cross-attention), or asks a second time (it runs alone, and the tensor may
        have been written to in between). Dropped when every sibling was served, or after as many calls as there are siblings.
        """
        asked = self._asked + 1
        if self._source is not x or id(quantizer) in self._served:
            asked = 1 if id(quantizer) in self._served else asked
            with torch.no_grad():
                self._source, self._values, self._served = x, quantizer(x), []
        values = self._values
        assert values is not None
        self._served.append(id(quantizer))
        self._asked = asked
        if asked >= self.size:
            self.clear()
        return straight_through(x, values)

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
