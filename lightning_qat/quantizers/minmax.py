"""Min-max quantization without clipping: LLM-QAT (arXiv 2305.17888), section 3.2.

    symmetric     x_q = scale * round(x / scale),   scale = max|x| / (2^(b-1) - 1)
    asymmetric    the range [min(x, 0), max(x, 0)] on codes 0 .. 2^b - 1 with an integer zero point, or [min x, max x] with a float one

Departures from the reference code: no epsilons in the scale (so codes are exact and re-quantizing changes nothing), codes are clamped,
bits of 16 are off, and the gradient is the paper's identity; ``options: {ste: clip}`` gives the reference's mask at |x| >= 2. Range finders
other than the extremes clip on purpose (``range_finder``).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.range_search import LpSearch, Percentile
from lightning_qat.numerics.ranges import AbsMax, MinMax, RangeFinder
from lightning_qat.numerics.rounding import Rounding
from lightning_qat.quantizers.base import Quantizer, quantizers
from lightning_qat.registry import did_you_mean
from lightning_qat.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class MinMaxOptions:
    """Settings of the min-max quantizer.

    Args:
        ste: ``identity`` passes every gradient; ``mask`` zeroes it where a code had to be clamped; ``clip`` where |x| >= `clip_value`.
        clip_value: The reference hard-codes 2.0, whatever the scale.
        percentile: Share of each block inside the range, for ``range_finder="percentile"``.
        p: Power of the error, for ``range_finder="lp"``; ``mse`` is 2.
        candidates: Ranges tried by ``mse`` and ``lp``.
        momentum: How slowly the running range of ``dynamic=False`` follows, in [0, 1).
    """

    ste: Literal["identity", "mask", "clip"] = "identity"
    clip_value: float = 2.0
    percentile: float = 0.999
    p: float = 2.4
    candidates: int = 80
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.ste not in ("identity", "mask", "clip"):
            raise ValueError(f"options.ste: got {self.ste!r}, {did_you_mean(self.ste, ('identity', 'mask', 'clip'))}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"options.momentum: got {self.momentum}, allowed are 0 up to less than 1")


@quantizers.register("minmax")
class MinMaxQuantizer(Quantizer):
    """Scale from the largest magnitude, or from the smallest and largest value, of each block."""

    Options: ClassVar[type | None] = MinMaxOptions

    @staticmethod
    def build_grid(spec: TensorSpec) -> Grid:
        """Signed codes around 0, or unsigned codes with a zero point."""
        bits = spec.code_bits
        if not spec.symmetric and spec.code_range != "narrow":
            raise ValueError(
                f"TensorSpec.code_range: got {spec.code_range!r} with symmetric=False, whose codes are always 0 to 2^bits - 1; leave it out"
            )
        if spec.symmetric and bits == 1 and spec.code_range != "unsigned":
            raise ValueError("TensorSpec.bits: got 1 with quantizer 'minmax', whose only 1-bit level would be 0; use 'mean_abs'")
        unsigned = spec.code_range == "unsigned" or not spec.symmetric
        if unsigned and spec.divisor != "qmax":
            raise ValueError("TensorSpec.divisor: got 'half_range' on unsigned codes, whose range is divided by 2^bits - 1; use 'qmax'")
        conventions = ("scale_dtype", "scale_rounding", "round_via", "arithmetic")
        settings: dict[str, Any] = {name: getattr(spec, name) for name in conventions}
        settings["zero"] = "none" if spec.symmetric else spec.zero_point
        if unsigned:
            return Grid(qmin=0, qmax=2**bits - 1, divisor=2**bits - 1, **settings)
        half = 2 ** (bits - 1)
        divisor = half - 1 if spec.divisor == "qmax" else half - 0.5
        return Grid(qmin=-half + (spec.code_range == "narrow"), qmax=half - 1, divisor=divisor, **settings)

    def build_finder(self) -> RangeFinder:
        """The extremes, or a closer look."""
        finder, options = self.spec.range_finder, self.options
        if finder == "percentile":
            return Percentile(options.percentile)
        if finder in ("mse", "lp"):
            return LpSearch(p=2.0 if finder == "mse" else options.p, candidates=options.candidates)
        return AbsMax() if self.grid.zero == "none" and self.grid.qmin < 0 else MinMax()

    def build_rounding(self) -> Rounding:
        """With the estimator that was asked for."""
        return replace(super().build_rounding(), ste=self.options.ste, clip_value=self.options.clip_value)

    @property
    def momentum(self) -> float:
        """As in the options."""
        return self.options.momentum
