"""What one fake quantization does, apart from its tensors."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_qat.numerics.blocks import ROWS, Blocking
from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.ranges import RangeFinder

STE = Literal["identity", "mask", "clip"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Everything but the tensors; hashable.

    Args:
        grid: The code grid.
        finder: Finds the range of each block; None where scales are given.
        blocking: Which elements of a tensor share a scale.
        ste: The estimator of the gradient.
        clip_value: The bound of ``clip``.
    """

    grid: Grid
    finder: RangeFinder | None = None
    blocking: Blocking = ROWS
    ste: STE = "identity"
    clip_value: float = 2.0
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.finder} {self.grid}")
        BY_KEY[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        BY_KEY[self.key] = self

    @property
    def is_fusable(self) -> bool:
        """Whether a compiler keeps the bits of the scale: it does for maxima, not for sums, whose order it chooses."""
        return self.finder is not None and self.finder.fusable


BY_KEY: dict[str, Rounding] = {}  # an op takes plain values only: it is told the key
