"""Triton kernels over rows of blocks: range, scale, codes and values in one pass.

They give the bits of :mod:`~lightning_qat.numerics.backends.reference` on the CPU, which takes some care on a GPU:

    division      ``tl.div_rn``; the bare operator is approximate there, and torch multiplies by the reciprocal of a number
    rounding      by the sum with 2^23, which leaves no bits behind the point; nothing of libdevice, so the interpreter runs all of it
    clamping      by comparisons: they keep NaN and the sign of zero as torch does, minima and maxima do not
    NaN           reductions pass over it, so it is looked for on its own
    bfloat16      is loaded and stored as int16 and rounded with integers, the same on every chip and in the interpreter
    indices       start as int64: rows * columns may exceed 2^31

A tile is [ROWS, COLS]: many short rows, or a part of a long one. Launch without fused multiply-adds, they skip a rounding.
"""

# ruff: noqa: N803, N806 (what is known to the compiler is written in capitals)

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr((2 - 2.0**-23) * 2.0**127)  # of fp32
LARGEST_RANGE = tl.constexpr((2 - 2.0**-23) * 2.0**127 * (1 - 2.0**-20))  # codes of such a range cannot overflow
SMALLEST = tl.constexpr(2.0**-126)  # normal number
LARGEST_BFLOAT16 = tl.constexpr((2 - 2.0**-7) * 2.0**127)
LARGEST_FLOAT16 = tl.constexpr(65504.0)
WHOLE = tl.constexpr(2.0**23)  # floats from here on have no fraction
SIGN = tl.constexpr(-(2**31))  # the sign bit of an int32


@triton.jit
def _from_bfloat16(bits: tl.tensor) -> tl.tensor:
    """The fp32 number of the upper half of its bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bfloat16(values: tl.tensor) -> tl.tensor:
    """The nearest bfloat16, ties to even, as int16 bits."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _load(pointers: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """Numbers as fp32, 0 where not valid."""
    x = tl.load(pointers, mask=valid, other=0)
    return _from_bfloat16(x) if x.dtype == tl.int16 else x.to(tl.float32)


@triton.jit
def _store(pointers: tl.tensor, values: tl.tensor, valid: tl.tensor) -> None:
    """Fp32 numbers in the type behind the pointers."""
    kind: tl.constexpr = pointers.dtype.element_ty
    tl.store(pointers, _to_bfloat16(values) if kind == tl.int16 else values.to(kind), mask=valid)


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """The nearest integer, ties to even, of any float; keeps NaN, inf and the sign of zero."""
    magnitude = tl.abs(x)
    whole = (magnitude + WHOLE) - WHOLE
    signed = whole.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN)
    return tl.where(magnitude < WHOLE, signed.to(tl.float32, bitcast=True), x)


@triton.jit
def _clamped(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _nearest(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Rounded to a type; what overflows there becomes inf."""
    if DTYPE == "bfloat16":
        x = _from_bfloat16(_to_bfloat16(x))
    elif DTYPE == "float16":
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def _stored(x: tl.tensor, SCALE_DTYPE: tl.constexpr) -> tl.tensor:
    """Rounded to the type that scales are kept in; what overflows there saturates."""
    if SCALE_DTYPE == "bfloat16":
        x = _clamped(x, -LARGEST_BFLOAT16, LARGEST_BFLOAT16)
    elif SCALE_DTYPE == "float16":
        x = _clamped(x, -LARGEST_FLOAT16, LARGEST_FLOAT16)
    return _nearest(x, SCALE_DTYPE)


@triton.jit
def _step(magnitude: tl.tensor, divisor: tl.tensor, SCALE_DTYPE: tl.constexpr) -> tl.tensor:
    """The scale of a range: NaN where that is not finite, else 0 or a number whose reciprocal is finite."""
    magnitude = tl.where(tl.abs(magnitude) <= LARGEST, tl.where(magnitude > LARGEST_RANGE, LARGEST_RANGE, magnitude), float("nan"))
    scale = tl.div_rn(magnitude, tl.full(magnitude.shape, divisor, tl.float32))
    return _stored(tl.where(scale > 0, _clamped(scale, SMALLEST, LARGEST), scale), SCALE_DTYPE)


@triton.jit
def _scale_and_zero(
    low: tl.tensor,
    high: tl.tensor,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    DIVISOR: tl.constexpr,
    ZERO: tl.constexpr,
    SCALE_DTYPE: tl.constexpr,
    COMPUTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """See :func:`~lightning_qat.numerics.ranges.scale_and_zero_point`; the zero of grids without one means nothing."""
    high = tl.where(tl.abs(low) <= LARGEST, high, low)
    if ZERO == "none":
        scale = _stored(_step(high, DIVISOR, SCALE_DTYPE), COMPUTED)
        zero = scale
    elif ZERO == "float":
        scale = _step(high - low, DIVISOR, SCALE_DTYPE)
        zero = _stored(low, SCALE_DTYPE)
    else:
        scale = _step(high * 0.5 - low * 0.5, DIVISOR * 0.5, SCALE_DTYPE)
        zero = _clamped(_rounded(tl.div_rn(-low, tl.where(scale == 0, 1.0, scale))) + QMIN, QMIN, QMAX)
    return scale, zero


@triton.jit
def _extremes(x: tl.tensor, valid: tl.tensor, ABSMAX: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(smallest, largest, 1 if there is a NaN) of each row [ROWS]; of magnitudes only the largest counts."""
    known = valid & (x == x)
    if ABSMAX:
        high = tl.max(tl.where(known, tl.abs(x), 0.0), axis=1)
        low = high
    else:
        high = tl.max(tl.where(known, x, -INF), axis=1)
        low = tl.min(tl.where(known, x, INF), axis=1)
    return low, high, tl.max((x != x).to(tl.int32), axis=1)


@triton.jit
def _range(low: tl.tensor, high: tl.tensor, nan: tl.tensor, ABSMAX: tl.constexpr, ZERO: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The range that AbsMax or MinMax make of the extremes."""
    if ABSMAX:
        low = high * -1.0
    elif ZERO != "float":
        low = tl.where(low > 0, 0.0, low)
        high = tl.where(high < 0, 0.0, high)
    return tl.where(nan != 0, float("nan"), low), tl.where(nan != 0, float("nan"), high)


@triton.jit
def _unclamped(
    x: tl.tensor, scale: tl.tensor, zero: tl.tensor, OFFSET: tl.constexpr, ZERO: tl.constexpr, RECIPROCAL: tl.constexpr,
    COMPUTED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """See :func:`~lightning_qat.numerics.grid.unclamped`."""
    if ZERO == "float":
        x = x - zero
    safe = tl.where(scale == 0, 1.0, scale)
    steps = x * _nearest(tl.div_rn(tl.full(safe.shape, 1.0, tl.float32), safe), COMPUTED) if RECIPROCAL else tl.div_rn(x, safe)
    steps = _nearest(steps, COMPUTED)
    if OFFSET != 0:
        steps = steps - OFFSET
    codes = _rounded(steps)
    if ZERO == "integer":
        codes = codes + zero
    return codes


@triton.jit
def _decoded(
    codes: tl.tensor, scale: tl.tensor, zero: tl.tensor, OFFSET: tl.constexpr, ZERO: tl.constexpr, LATE_DTYPE: tl.constexpr,
    LIMIT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Values of codes within +-LIMIT, the largest number of the type they are stored in."""
    scale = _stored(scale, LATE_DTYPE)
    if ZERO == "float":
        values = codes * scale + zero
    else:
        if ZERO == "integer":
            codes = codes - zero
        if OFFSET != 0:
            codes = codes + OFFSET
        values = codes * scale
    return _clamped(values, -LIMIT, LIMIT)


@triton.jit
def _quantized(
    x: tl.tensor, scale: tl.tensor, zero: tl.tensor, QMIN: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr,
    RECIPROCAL: tl.constexpr, COMPUTED: tl.constexpr, LATE_DTYPE: tl.constexpr, LIMIT: tl.constexpr, OUT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``values``, or ``codes`` with 0 for NaN."""
    codes = _clamped(_unclamped(x, scale, zero, OFFSET, ZERO, RECIPROCAL, COMPUTED), QMIN, QMAX)
    if OUT == "codes":
        return tl.where(codes == codes, codes, 0.0).to(tl.int32)
    return _decoded(codes, scale, zero, OFFSET, ZERO, LATE_DTYPE, LIMIT)


@triton.jit
def dynamic_kernel(
    x: tl.tensor, out: tl.tensor, scales: tl.tensor, zeros: tl.tensor, rows: tl.tensor, n: tl.tensor, stride: tl.tensor,
    QMIN: tl.constexpr, QMAX: tl.constexpr, DIVISOR: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    COMPUTED: tl.constexpr, RECIPROCAL: tl.constexpr, LATE_DTYPE: tl.constexpr, LIMIT: tl.constexpr, OUT: tl.constexpr,
    ABSMAX: tl.constexpr, LONG: tl.constexpr, COLS: tl.constexpr, ELEMENTS: tl.constexpr,
) -> None:  # fmt: skip
    """Values (or codes, scales and zero points) of rows x[rows, n], the range of each found on the way.

    A row that fits into a tile is read once. LONG rows, one to a program, are swept twice, the second time mostly from the cache.
    """
    ROWS: tl.constexpr = 1 if ELEMENTS < COLS else ELEMENTS // COLS
    rank = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, col = rank[:, None], tl.arange(0, COLS)[None, :]
    valid = (row < rows) & (col < n)
    tile = _load(x + row * stride + col, valid)
    low, high, nan = _extremes(tile, valid, ABSMAX)
    if LONG:
        for start in range(COLS, n, COLS):
            valid = (row < rows) & (start + col < n)
            next_low, next_high, next_nan = _extremes(_load(x + row * stride + start + col, valid), valid, ABSMAX)
            low, high, nan = tl.minimum(low, next_low), tl.maximum(high, next_high), tl.maximum(nan, next_nan)
    low, high = _range(low, high, nan, ABSMAX, ZERO)
    scale, zero = _scale_and_zero(low, high, QMIN, QMAX, DIVISOR, ZERO, SCALE_DTYPE, COMPUTED)
    if OUT == "codes":
        tl.store(scales + rank, scale, mask=rank < rows)
        if ZERO != "none":
            tl.store(zeros + rank, zero, mask=rank < rows)
    scale, zero = scale[:, None], zero[:, None]
    if LONG:
        for start in range(0, n, COLS):
            valid = (row < rows) & (start + col < n)
            part = _load(x + row * stride + start + col, valid)
            done = _quantized(part, scale, zero, QMIN, QMAX, OFFSET, ZERO, RECIPROCAL, COMPUTED, LATE_DTYPE, LIMIT, OUT)
            _store(out + row * n + start + col, done, valid)
    else:
        done = _quantized(tile, scale, zero, QMIN, QMAX, OFFSET, ZERO, RECIPROCAL, COMPUTED, LATE_DTYPE, LIMIT, OUT)
        _store(out + row * n + col, done, valid)


@triton.jit
def scale_kernel(
    lows: tl.tensor, highs: tl.tensor, scales: tl.tensor, zeros: tl.tensor, rows: tl.tensor,
    QMIN: tl.constexpr, QMAX: tl.constexpr, DIVISOR: tl.constexpr, ZERO: tl.constexpr, SCALE_DTYPE: tl.constexpr, COMPUTED: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Scales and zero points of ranges, all [rows, 1]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    low, high = tl.load(lows + row, mask=valid, other=0.0), tl.load(highs + row, mask=valid, other=0.0)
    scale, zero = _scale_and_zero(low, high, QMIN, QMAX, DIVISOR, ZERO, SCALE_DTYPE, COMPUTED)
    tl.store(scales + row, scale, mask=valid)
    if ZERO != "none":
        tl.store(zeros + row, zero, mask=valid)


@triton.jit
def given_kernel(
    x: tl.tensor, out: tl.tensor, scales: tl.tensor, zeros: tl.tensor, rows: tl.tensor, n: tl.tensor, stride: tl.tensor,
    QMIN: tl.constexpr, QMAX: tl.constexpr, OFFSET: tl.constexpr, ZERO: tl.constexpr, RECIPROCAL: tl.constexpr, COMPUTED: tl.constexpr,
    LATE_DTYPE: tl.constexpr, LIMIT: tl.constexpr, OUT: tl.constexpr, COLS: tl.constexpr, ELEMENTS: tl.constexpr,
) -> None:  # fmt: skip
    """Values or codes of rows x[rows, n] with scales [rows, 1], or which of them lie outside, as bits [rows, ceil(n / 8)]."""
    ROWS: tl.constexpr = 1 if ELEMENTS < COLS else ELEMENTS // COLS
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(n, COLS)
    row = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    first = program % tiles * COLS
    col = first + tl.arange(0, COLS)[None, :]
    valid = (row < rows) & (col < n)
    tile = _load(x + row * stride + col, valid)
    scale = tl.load(scales + row, mask=row < rows, other=1.0)
    zero = scale
    if ZERO != "none":
        zero = tl.load(zeros + row, mask=row < rows, other=0.0)
    if OUT == "outside":
        codes = _unclamped(tile, scale, zero, OFFSET, ZERO, RECIPROCAL, COMPUTED)
        clamped = (valid & (((codes >= QMIN) & (codes <= QMAX)) == 0)).to(tl.int32)  # a NaN is not inside either
        packed = tl.sum(tl.reshape(clamped << (tl.arange(0, COLS)[None, :] & 7), (ROWS, COLS // 8, 8)), axis=2)
        byte, width = (first >> 3) + tl.arange(0, COLS // 8)[None, :], tl.cdiv(n, 8)
        tl.store(out + row * width + byte, packed.to(tl.uint8), mask=(row < rows) & (byte < width))
    else:
        done = _quantized(tile, scale, zero, QMIN, QMAX, OFFSET, ZERO, RECIPROCAL, COMPUTED, LATE_DTYPE, LIMIT, OUT)
        _store(out + row * n + col, done, valid)


@triton.jit
def gradient_kernel(
    grad: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    COLS: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    """The gradient [rows, n], 0 where a bit of the mask [rows, ceil(n / 8)] is set."""
    ROWS: tl.constexpr = 1 if ELEMENTS < COLS else ELEMENTS // COLS
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(n, COLS)
    row = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    col = program % tiles * COLS + tl.arange(0, COLS)[None, :]
    valid = (row < rows) & (col < n)
    byte = tl.load(mask + row * tl.cdiv(n, 8) + (col >> 3), mask=valid, other=0).to(tl.int32)
    bit = (byte >> (col & 7).to(tl.int32)) & 1
    _store(out + row * n + col, tl.where(bit != 0, 0.0, _load(grad + row * stride + col, valid)), valid)
