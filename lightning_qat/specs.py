"""How one tensor is quantized, as data: bits, what shares a scale, and every convention a runtime fixes.

Frozen keyword-only dataclasses without inheritance: jsonargparse reads them from YAML as they are and checkpoints hold them as
plain dictionaries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_qat.registry import did_you_mean

INTEGER_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
OFF = 16  # "16" is the paper's word for not quantized
GRANULARITIES = ("tensor", "channel", "group", "token", "token_head")

CodeRange = Literal["narrow", "full", "unsigned"]
RangeFinderName = Literal["absmax", "percentile", "mse", "lp"]
Divisor = Literal["qmax", "half_range"]
ScaleDtype = Literal["float32", "bfloat16", "float16"]
RoundVia = Literal["divide", "reciprocal"]
Arithmetic = Literal["float32", "input"]
ScaleRounding = Literal["before", "after"]
SCALE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def _choose(owner: str, field: str, got: object, allowed: tuple[str, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{owner}.{field}: got {got!r}, {did_you_mean(got, allowed)}")


def _check_bits(owner: str, bits: float | None) -> int | None:
    """The bits as an integer, so that 4 and YAML's 4.0 are the same spec."""
    if bits is None or bits == OFF or bits in INTEGER_BITS:
        return None if bits is None else int(bits)
    if bits == 1.58:
        raise ValueError(f"{owner}.bits: ternary (1.58) has no quantizer yet; use 1 or 2")
    raise ValueError(f"{owner}.bits: got {bits!r}, allowed are 1 to 8; 16 or null turns quantization off")


class Options(dict[str, Any]):
    """Options of one quantizer: a dictionary that cannot change, so that a spec stays hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return Options, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("options of a TensorSpec cannot change; build a new spec with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one tensor is quantized.

    Args:
        bits: Bits per code, 1 to 8; 16 or None turns quantization off.
        quantizer: Registered name of the rule that finds the scale (``lightning_qat/quantizers``).
        granularity: What shares a scale: the ``tensor``, an output ``channel``, a ``group`` of neighbours along the inputs,
            a ``token`` (the last axis; for a convolution's input one sample), or a token of one attention head (``token_head``).
        group_size: Elements that share a scale; needed by, and only by, ``granularity="group"``.
        symmetric: Zero sits at code 0; otherwise an integer zero point is stored beside each scale.
        axis: The axis of ``granularity="channel"``: each of its indices has a scale over all the rest; None is every row along the last
            axis, which for a matrix [out, in] is axis 0.
        zero_point: With ``symmetric=False`` an ``integer`` code (the range includes 0), or a ``float`` value added after scaling.
        dynamic: The range is taken from the tensor at hand; otherwise from a running range that training updates (``tensor`` only).
        range_finder: ``absmax`` (with `symmetric` max |x|, else min and max), ``percentile`` of them, or the range with the least error:
            ``mse``, or ``lp`` for another power. Their settings are `options` of the quantizer.
        options: Settings of the quantizer, checked against its own options dataclass.
        code_range: ``narrow`` leaves out the most negative code (-7..7 at 4 bits), ``full`` keeps it (-8..7), ``unsigned`` is 0..15, for
            tensors that are never negative.
        divisor: Largest magnitude over ``qmax`` (7 at 4 bits, 127 at 8) or over half the range (7.5, 127.5).
        scale_dtype: The type that scales are stored in; they are rounded to it.
        scale_rounding: ``before``: codes are computed with the rounded scale; ``after``: with the scale in at least fp32, and only their
            values with the rounded one, as llama.cpp does. For symmetric grids with a half-precision `scale_dtype`.
        round_via: ``divide`` computes x / scale, ``reciprocal`` computes x * (1 / scale); they differ by an ulp.
        arithmetic: ``float32`` computes in at least fp32; ``input`` in the dtype of the tensor, as some runtimes do: of bf16 and fp16
            tensors the scale (rounded to `scale_dtype` first) and each quotient are rounded to it. Symmetric grids only.
    """

    bits: float | None
    quantizer: str = "minmax"
    granularity: Literal["tensor", "channel", "group", "token", "token_head"] = "channel"
    group_size: int | None = None
    axis: int | None = None
    symmetric: bool = True
    zero_point: Literal["integer", "float"] = "integer"
    dynamic: bool = True
    range_finder: RangeFinderName = "absmax"
    options: Mapping[str, Any] | None = None
    code_range: CodeRange = "narrow"
    divisor: Divisor = "qmax"
    scale_dtype: ScaleDtype = "float32"
    scale_rounding: ScaleRounding = "before"
    round_via: RoundVia = "divide"
    arithmetic: Arithmetic = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _check_bits("TensorSpec", self.bits))
        if not isinstance(self.quantizer, str):
            raise ValueError(f"TensorSpec.quantizer: got {self.quantizer!r}, expected the name of a quantizer")
        _choose("TensorSpec", "granularity", self.granularity, GRANULARITIES)
        _choose("TensorSpec", "zero_point", self.zero_point, ("integer", "float"))
        _choose("TensorSpec", "range_finder", self.range_finder, ("absmax", "percentile", "mse", "lp"))
        _choose("TensorSpec", "code_range", self.code_range, ("narrow", "full", "unsigned"))
        _choose("TensorSpec", "divisor", self.divisor, ("qmax", "half_range"))
        _choose("TensorSpec", "scale_dtype", self.scale_dtype, tuple(SCALE_BITS))
        _choose("TensorSpec", "scale_rounding", self.scale_rounding, ("before", "after"))
        _choose("TensorSpec", "round_via", self.round_via, ("divide", "reciprocal"))
        _choose("TensorSpec", "arithmetic", self.arithmetic, ("float32", "input"))
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(
                f"TensorSpec.group_size: got {self.group_size!r} with granularity={self.granularity!r}; a group size is "
                "needed by granularity='group' and allowed nowhere else"
            )
        if self.group_size is not None and (type(self.group_size) is not int or self.group_size < 1):
            raise ValueError(f"TensorSpec.group_size: got {self.group_size}, allowed are positive integers")
        if self.axis is not None and (self.granularity != "channel" or type(self.axis) is not int):
            raise ValueError(f"TensorSpec.axis: got {self.axis!r} with granularity={self.granularity!r}; an integer, for 'channel' only")
        if self.symmetric and self.zero_point != "integer":
            raise ValueError("TensorSpec.zero_point: got 'float' with symmetric=True, which has no zero point; use symmetric=False")
        if self.arithmetic == "input" and not self.symmetric:
            raise ValueError(
                "TensorSpec.arithmetic: got 'input' with symmetric=False, whose zero points are computed in fp32 only; use 'float32'"
            )
        if self.scale_rounding == "after":
            self._check_late_rounding()
        if not self.dynamic and self.granularity != "tensor":
            raise ValueError(
                f"TensorSpec.dynamic: got False with granularity={self.granularity!r}; a running range is kept per 'tensor' only"
            )
        object.__setattr__(self, "options", Options(self.options) if self.options else None)

    def _check_late_rounding(self) -> None:
        for field, wrong, why in (
            ("scale_dtype", "float32", "which rounds no scale; use 'float16' or 'bfloat16'"),
            ("symmetric", False, "whose zero points are computed with the rounded scale only; use symmetric=True"),
            ("arithmetic", "input", "which rounds the scale to the dtype of the tensor first; use arithmetic='float32'"),
        ):
            if getattr(self, field) == wrong:
                raise ValueError(f"TensorSpec.scale_rounding: got 'after' with {field}={wrong!r}, {why}, or scale_rounding='before'")

    @property
    def is_off(self) -> bool:
        """Whether this spec leaves the tensor alone."""
        return self.bits is None or self.bits >= OFF

    @property
    def code_bits(self) -> int:
        """Bits that one stored code takes."""
        if self.bits is None or self.is_off:
            raise ValueError("TensorSpec.bits: this spec is off (16 or null); it has no codes")
        return int(self.bits)

    def scales_in(self, rows: int, columns: int) -> int:
        """How many scales a matrix of `rows` x `columns` needs."""
        channels = columns if self.axis in (1, -1) else rows
        per = {"tensor": 1, "group": rows * (columns // (self.group_size or 1)), "channel": channels}
        return per.get(self.granularity, rows)

    def storage_bits(self, rows: int, columns: int) -> int:
        """Exact bits of a stored matrix: codes, scales, and zero points where there are any."""
        per_zero_point = 0 if self.symmetric else SCALE_BITS[self.scale_dtype] if self.zero_point == "float" else self.code_bits
        per_scale = SCALE_BITS[self.scale_dtype] + per_zero_point
        return rows * columns * self.code_bits + self.scales_in(rows, columns) * per_scale


@dataclass(frozen=True, kw_only=True)
class KVSpec:
    """How keys and values of attention are quantized (LLM-QAT, section 3.3).

    `quantizer`, `symmetric`, `zero_point`, `code_range`, `divisor`, `scale_dtype`, `scale_rounding`, `round_via` and
    `arithmetic` are those of :class:`TensorSpec`.

    Args:
        bits: Bits per code, 2 to 8; 16 or None turns quantization off.
        position: ``post_rope`` quantizes what a serving cache stores; ``pre_rope`` the projections' outputs, as the paper does.
        granularity: One scale per token and head (``token_head``), or per token over all heads (``token``).
        past_only: Quantize only the past, not the current token; not implemented yet.
    """

    bits: float | None
    position: Literal["pre_rope", "post_rope"] = "post_rope"
    granularity: Literal["token", "token_head"] = "token_head"
    past_only: bool = False
    quantizer: str = "minmax"
    symmetric: bool = True
    zero_point: Literal["integer", "float"] = "integer"
    code_range: CodeRange = "narrow"
    divisor: Divisor = "qmax"
    scale_dtype: ScaleDtype = "float32"
    scale_rounding: ScaleRounding = "before"
    round_via: RoundVia = "divide"
    arithmetic: Arithmetic = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _check_bits("KVSpec", self.bits))
        _choose("KVSpec", "position", self.position, ("pre_rope", "post_rope"))
        _choose("KVSpec", "granularity", self.granularity, ("token", "token_head"))
        if self.bits == 1:
            raise ValueError("KVSpec.bits: got 1, allowed are 2 to 8; 16 or null turns quantization off")
        if self.past_only:
            raise ValueError("KVSpec.past_only: not implemented yet; use past_only=False")
        self.tensor  # noqa: B018  the shared fields are checked where they are defined

    @property
    def is_off(self) -> bool:
        """Whether this spec leaves keys and values alone."""
        return self.bits is None or self.bits >= OFF

    @property
    def tensor(self) -> TensorSpec:
        """The same settings for one tensor."""
        shared = [field.name for field in fields(self) if field.name not in ("position", "past_only")]
        return TensorSpec(**{name: getattr(self, name) for name in shared})
