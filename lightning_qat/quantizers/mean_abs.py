"""Levels at multiples of mean|w| for weights of one and two bits, as LLM-QAT's reference code defines them.

    1 bit     w_q = m * sign(w)                     levels -m, +m              m = mean|w| of the block
    2 bits    w_q = m * (k + 1/2), k in -2..1       levels -1.5m .. +1.5m

Both are a grid with offset 1/2. Departure: the reference's sign(0) = 0 is a third level; here a weight of exactly 0 takes +m, so that
one bit is enough. A block of zeros stays zero.
"""

from lightning_qat.numerics.grid import Grid
from lightning_qat.numerics.range_search import MeanAbs
from lightning_qat.numerics.ranges import RangeFinder
from lightning_qat.quantizers.base import Quantizer, quantizers
from lightning_qat.specs import TensorSpec


@quantizers.register("mean_abs")
class MeanAbsQuantizer(Quantizer):
    """Binary and four-level weights; the gradient is the identity, as in the reference."""

    @staticmethod
    def build_grid(spec: TensorSpec) -> Grid:
        """Half-integer levels of one or two bits."""
        bits = spec.code_bits
        if bits not in (1, 2):
            raise ValueError(f"TensorSpec.bits: got {bits} with quantizer 'mean_abs', allowed are 1 and 2; use 'minmax'")
        if spec.divisor != "qmax":
            raise ValueError("TensorSpec.divisor: got 'half_range' with quantizer 'mean_abs', which divides by nothing; use 'qmax'")
        if not spec.symmetric:
            raise ValueError("TensorSpec.symmetric: got False with quantizer 'mean_abs', whose levels are symmetric; use True")
        fixed = {"code_range": "narrow", "range_finder": "absmax", "dynamic": True, "arithmetic": "float32", "scale_rounding": "before"}
        for field, expected in fixed.items():
            if (got := getattr(spec, field)) != expected:
                raise ValueError(f"TensorSpec.{field}: got {got!r} with quantizer 'mean_abs', allowed is {expected!r}; or use 'minmax'")
        step = 2 if bits == 1 else 1  # in units of m
        return Grid(qmin=-bits, qmax=bits - 1, divisor=1 / step, offset=0.5, scale_dtype=spec.scale_dtype, round_via=spec.round_via)

    def build_finder(self) -> RangeFinder:
        """The range is m, of which one step is m at two bits and 2m at one bit."""
        return MeanAbs()
