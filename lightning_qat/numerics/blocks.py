"""Which elements of a tensor share a scale: the one place that knows what a granularity means for a shape."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """Views a tensor so that what shares a scale lies along the last axis.

    =========  ============================  =====================
    share      blocks of x                   scales
    =========  ============================  =====================
    ``row``    [..., n]                      [...]
    ``group``  [..., n / size, size]         [..., n / size]
    ``axis``   [x.shape[axis], the rest]     [x.shape[axis]]
    ``all``    [1, x.numel()]                [1]
    =========  ============================  =====================

    Args:
        share: What has a scale of its own: each ``row`` along the last axis, each ``group`` of it, each index of an ``axis``, or nothing
            less than the whole tensor (``all``).
        size: Elements of a group.
        axis: The axis of ``axis``.
    """

    share: Literal["row", "group", "axis", "all"] = "row"
    size: int | None = None
    axis: int = 0

    def split(self, x: Tensor) -> Tensor:
        """Blocks of `x`; a view where strides allow.

        Raises:
            ValueError: A group size that does not divide the last axis, an axis that is not there.
        """
        if self.share == "all":
            return x.reshape(1, -1)
        if self.share == "row":
            return x if x.dim() else x.reshape(1)
        if self.share == "axis":
            if not -x.dim() <= self.axis < x.dim():
                raise ValueError(f"axis: got {self.axis} for a tensor of shape {tuple(x.shape)}")
            return x.movedim(self.axis, 0).reshape(x.shape[self.axis], x.numel() // max(x.shape[self.axis], 1))
        assert self.size is not None
        if x.dim() == 0 or x.shape[-1] % self.size:
            last = x.shape[-1] if x.dim() else "no length"
            raise ValueError(f"group_size: got {self.size} for a last axis of {last}; it must divide it without rest")
        return x.unflatten(-1, (x.shape[-1] // self.size, self.size))

    def rows(self, x: Tensor) -> Tensor:
        """The blocks of `x` one below the other, [blocks, n]."""
        blocks = self.split(x)
        return blocks if blocks.dim() == 2 else blocks.reshape(-1, blocks.shape[-1])

    def join(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`split` for a tensor of `shape`."""
        if self.share != "axis":
            return blocks.reshape(shape)
        moved = list(shape)
        moved.insert(0, moved.pop(self.axis))
        return blocks.reshape(moved).movedim(0, self.axis)


ROWS = Blocking()
