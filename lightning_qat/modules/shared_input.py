"""Quantize an input once for the siblings that read it: q/k/v, gate/up.

The first sibling computes the values, the last one drops them, so nothing outlives one pass through the block; each sibling applies its
own straight-through estimator, so no graph node is shared (which breaks under activation checkpointing).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
        self._dtype: torch.dtype | None = None
        self._values: Any = None
        self._served: list[int] = []
        self._asked = 0

    def take(self, sibling: nn.Module, x: Tensor, dtype: torch.dtype | None, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of `x` (without gradients), for one sibling.

        Computed anew when a sibling brings another tensor (cross-attention) or dtype, or asks a second time (it runs alone, and the tensor
        may have been written to in between). Dropped when every sibling was served, or after as many calls as there are siblings.
        """
        again, asked = id(sibling) in self._served, self._asked + 1
        if self._source is not x or self._dtype != dtype or again:
            asked = 1 if again else asked
            with torch.no_grad():
                self._source, self._dtype, self._values, self._served = x, dtype, compute(), []
        values = self._values
        self._served.append(id(sibling))
        self._asked = asked
        if asked >= self.size:
            self.clear()
        return values

    def __getstate__(self) -> dict[str, int]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["size"])  # type: ignore[misc]
