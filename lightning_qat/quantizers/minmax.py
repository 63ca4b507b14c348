"""Min-max quantization without clipping: LLM-QAT (arXiv 2305.17888), section 3.2.

    symmetric     x_q = scale * round(x / scale),   scale = max|x| / (2^(b-1) - 1)
    asymmetric    the range [min(x, 0), max(x, 0)] on codes 0 .. 2^b - 1 with an integer zero point

Departures from the reference code: no epsilons in the scale (so codes are exact and re-quantizing changes nothing), codes are clamped,
bits of 16 are off, and the gradient is the paper's identity; ``options: {ste: clip}`` gives the reference's mask at |x| >= 2.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.ranges import absmax_scale, minmax_scale, round_scale
from lightning_qat.quantizers.base import Quantizer, quantizers
from lightning_qat.registry import did_you_mean
from lightning_qat.specs import TensorSpec


@dataclass(frozen=True, kw_only=True)
class MinMaxOptions:
    """Settings of the min-max quantizer.

    Args:
        ste: ``identity`` passes every gradient; ``clip`` zeroes it where |x| >= `clip_value`.
        clip_value: The reference hard-codes 2.0, whatever the scale.
    """

    ste: Literal["identity", "clip"] = "identity"
    clip_value: float = 2.0

    def __post_init__(self) -> None:
        if self.ste not in ("identity", "clip"):
            raise ValueError(f"options.ste: got {self.ste!r}, {did_you_mean(self.ste, ('identity', 'clip'))}")


@quantizers.register("minmax")
class MinMaxQuantizer(Quantizer):
    """Scale from the largest magnitude, or from the smallest and largest value, of each block."""

    Options: ClassVar[type | None] = MinMaxOptions

    @staticmethod
    def build_grid(spec: TensorSpec) -> Grid:
        """Signed codes around 0, or unsigned codes with a zero point."""
        bits = spec.code_bits
        if spec.symmetric and bits == 1:
            raise ValueError("TensorSpec.bits: got 1 with quantizer 'minmax', whose only 1-bit level would be 0; use 'mean_abs'")
        if not spec.symmetric and spec.divisor != "qmax":
            raise ValueError("TensorSpec.divisor: got 'half_range' with symmetric=False, whose range is divided by 2^bits - 1; use 'qmax'")
        if not spec.symmetric:
            return Grid(qmin=0, qmax=2**bits - 1, round_via=spec.round_via)
        half = 2 ** (bits - 1)
        return Grid(qmin=-half + (spec.code_range == "narrow"), qmax=half - 1, round_via=spec.round_via)

    @property
    def clip(self) -> float | None:
        """The reference's mask, if asked for."""
        return self.options.clip_value if self.options.ste == "clip" else None

    def scale_and_zero_point(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ranges are taken before any rounding; the scale is rounded to its stored dtype before codes are computed."""
        bits, dtype = self.spec.code_bits, self.spec.scale_dtype
        if self.spec.symmetric:
            divisor = self.grid.qmax if self.spec.divisor == "qmax" else (2**bits - 1) / 2
            return round_scale(absmax_scale(blocks, divisor), dtype), None
        scale, low = minmax_scale(blocks, self.grid.qmax)
        scale = round_scale(scale, dtype)
        zero_point = (-low / scale.masked_fill(scale == 0, 1)).round().clamp(0, self.grid.qmax)
        return scale, zero_point
