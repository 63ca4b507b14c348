"""Scales, codes and values against formulas written out in numpy, and what happens at the edges of floating point."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.numerics.fake_quantize import quantize_with
from lightning_qat.numerics.grid import Grid, QuantizedTensor, as_blocks
from lightning_qat.quantizers import build_quantizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FULL = {"code_range": "full"}
HALF = {"divisor": "half_range"}
ASYM = {"symmetric": False}
MEAN = {"quantizer": "mean_abs"}


KINDS = {
    "narrow": {},
    "full": FULL,
    "full-half": FULL | HALF,
    "narrow-half": HALF,
    "asym": ASYM,
    "bf16-scale": {"scale_dtype": "bfloat16"},
    "fp16-scale": FULL | {"scale_dtype": "float16"},
    "asym-fp16-scale": ASYM | {"scale_dtype": "float16"},
    "reciprocal": {"round_via": "reciprocal"},
    "asym-reciprocal": ASYM | {"round_via": "reciprocal"},
    "mean_abs": MEAN,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def specs(kind: str) -> list[TensorSpec]:
    """The specs of one kind, all bits it allows."""
    bits = (1, 2) if kind == "mean_abs" else range(1 if "asym" in kind else 2, 9)
    return [TensorSpec(bits=b, **KINDS[kind]) for b in bits]


def rows(dtype: torch.dtype = torch.float32, count: int = 1000, columns: int = 24) -> Tensor:
    """Many seeds in one tensor: rows of very different size."""
    return (torch.randn(count, columns) * 10 ** torch.empty(count, 1).uniform_(-3, 2)).to(dtype)


def code_limits(spec: TensorSpec) -> tuple[int, int]:
    bits = int(spec.bits)
    if spec.quantizer == "mean_abs" or (spec.symmetric and spec.code_range == "full"):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if spec.symmetric else (0, 2**bits - 1)


def numpy_codes(x: np.ndarray, spec: TensorSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scale, zero point, codes) of rows, in float32 and with numpy's half-to-even rounding; min-max only."""
    f = np.float32
    qmin, qmax = code_limits(spec)
    if spec.symmetric:
        steps = f(2**spec.bits - 1) / f(2) if spec.divisor == "half_range" else f(qmax)
        low, scale = np.zeros((len(x), 1), f), np.abs(x).max(1, keepdims=True) / steps
    else:
        low, high = np.minimum(x.min(1, keepdims=True), f(0)), np.maximum(x.max(1, keepdims=True), f(0))
        scale = (high - low) / f(qmax)
    scale = torch.from_numpy(scale).to(STORED[spec.scale_dtype]).float().numpy()
    zero_point = np.clip(np.rint(-low / scale), 0, qmax) if not spec.symmetric else np.zeros_like(scale)
    steps_of_x = x / scale if spec.round_via == "divide" else x * (f(1) / scale)
    return scale, zero_point, np.clip(np.rint(steps_of_x) + zero_point, qmin, qmax)


def each(kind: str) -> Iterator[tuple[TensorSpec, torch.dtype]]:
    return itertools.product(specs(kind), DTYPES)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mean_abs"])
def test_scale_zero_point_and_codes_against_numpy(kind: str) -> None:
    for spec, dtype in each(kind):
        x = rows(dtype, count=200)
        scale, zero_point, codes = numpy_codes(x.float().numpy(), spec)
        ours = quantize_tensor(x, spec)
        assert np.array_equal(ours.scale.numpy(), scale[:, 0]), spec
        assert np.array_equal(ours.codes.numpy(), codes), spec
        assert (ours.zero_point is None) == spec.symmetric
        assert spec.symmetric or np.array_equal(ours.zero_point.numpy(), zero_point[:, 0]), spec
        values = torch.from_numpy((codes.astype(np.float32) - zero_point) * scale).to(dtype)
        assert torch.equal(ours.dequantize(), values), spec


@every_kind
def test_codes_are_small_integers_in_range(kind: str) -> None:
    for spec, dtype in each(kind):
        quantized = quantize_tensor(rows(dtype), spec)
        qmin, qmax = code_limits(spec)
        assert quantized.codes.dtype == (torch.uint8 if qmax > 127 else torch.int8), spec
        codes = quantized.codes.to(torch.int16)
        reached = qmin + 1 if spec.code_range == "full" and spec.divisor == "qmax" else qmin
        assert (int(codes.min()), int(codes.max())) == (reached, qmax), spec
        assert quantized.grid.levels == qmax - qmin + 1 <= 2**spec.bits, spec
        assert torch.equal(quantized.scale.to(STORED[spec.scale_dtype]).float(), quantized.scale), spec


@every_kind
def test_codes_of_the_values_are_the_codes(kind: str) -> None:
    """With the same scale, for every grid: quantizing what was quantized changes no code."""
    for spec, dtype in each(kind):
        for x in (rows(dtype, count=500), rows(dtype, count=500).abs()):
            first = quantize_tensor(x, spec)
            zero_point = None if first.zero_point is None else first.zero_point.unsqueeze(-1).float()
            again = quantize_with(first.dequantize(), first.scale.unsqueeze(-1), zero_point, first.grid)
            assert torch.equal(again.codes, first.codes), spec


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranging_again_changes_nothing_on_the_narrow_symmetric_grid(dtype: torch.dtype) -> None:
    for spec in specs("narrow"):
        once = fake_quantize(rows(dtype), spec)
        assert torch.equal(fake_quantize(once, spec), once), spec


@pytest.mark.parametrize("kind", ["full-half", "asym", "mean_abs"])
def test_ranging_again_does_change_values_elsewhere(kind: str) -> None:
    """Why the promise above is not made for every grid."""
    spec = specs(kind)[-1]
    once = fake_quantize(rows(), spec)
    assert not torch.equal(fake_quantize(once, spec), once)


@every_kind
def test_rows_of_zeros_stay_zero(kind: str) -> None:
    for spec, dtype in each(kind):
        x = rows(dtype, count=3)
        x[1] = 0
        y = fake_quantize(x, spec)
        assert (y[1].count_nonzero() == 0, y[[0, 2]].count_nonzero() > 0) == (True, True), spec
        assert torch.equal(quantize_tensor(x, spec).dequantize(), y), spec


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@every_kind
def test_what_is_not_finite_stays_in_its_row(kind: str, bad: float) -> None:
    for spec, dtype in each(kind):
        x = rows(dtype, count=4)
        clean = fake_quantize(x, spec)
        x[2, 5] = bad
        y = fake_quantize(x, spec)
        assert y[2].isnan().all(), spec
        assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]]), spec
        with pytest.raises(ValueError, match="NaN or inf"):
            quantize_tensor(x, spec)


def test_what_is_not_finite_stays_in_its_group() -> None:
    x = torch.ones(2, 8)
    x[0, 1] = float("inf")
    y = fake_quantize(x, TensorSpec(bits=4, granularity="group", group_size=4))
    assert y.isnan().tolist() == [[True] * 4 + [False] * 4, [False] * 8]
    assert fake_quantize(x, TensorSpec(bits=4, granularity="tensor")).isnan().all()


@every_kind
def test_the_largest_floats_stay_finite(kind: str) -> None:
    """A rounded scale or zero point may put the end of the grid beyond the largest float."""
    shape = torch.tensor([[1, -1, 0.5, 0.25], [-1, 0.5, -0.25, 0], [1, 1, 1, 1], [1, 0.99, 0, 0]], dtype=torch.float64)
    for spec, dtype in each(kind):
        x = (shape * torch.finfo(dtype).max).to(dtype)
        y = fake_quantize(x, spec)
        assert y.isfinite().all(), (spec, dtype)
        assert torch.equal(y, quantize_tensor(x, spec).dequantize()), spec


@every_kind
def test_the_smallest_floats_stay_small_and_finite(kind: str) -> None:
    for spec, magnitude in itertools.product(specs(kind), (1e-45, 1e-44, 3e-43, 1e-39, 3e-38, 1e-36)):
        x = torch.tensor([[1.0, -1, 0.5, 0]]) * magnitude
        y = fake_quantize(x, spec)
        assert y.isfinite().all(), (spec, magnitude)
        assert bool((y.abs() <= max(2 * magnitude, torch.finfo(x.dtype).tiny)).all()), (spec, magnitude)
        assert torch.equal(y, quantize_tensor(x, spec).dequantize()), (spec, magnitude)


def test_a_scale_that_its_dtype_cannot_hold_saturates() -> None:
    quantized = quantize_tensor(torch.tensor([1e9, -3e5, 1e-3]), TensorSpec(bits=4, scale_dtype="float16"))
    assert (quantized.scale.item(), quantized.codes.tolist()) == (65504, [7, -5, 0])


def test_float64_stays_float64() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    quantized = quantize_tensor(x, TensorSpec(bits=8))
    assert (quantized.scale.dtype, quantized.dequantize().dtype) == (torch.float64, torch.float64)
    assert torch.equal(quantized.scale, x.abs().amax(1) / 127)


def test_dequantize_reads_codes_by_hand() -> None:
    codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.int8)
    scale, zero_point = torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 0]], dtype=torch.int16)
    table = QuantizedTensor(codes=codes, scale=scale, zero_point=zero_point, grid=Grid(qmin=0, qmax=3), group_size=2, dtype=torch.bfloat16)
    assert table.dequantize().tolist() == [[-0.5, 1.0, 2.0, 4.0]]
    assert table.dequantize().dtype == torch.bfloat16
    half = Grid(qmin=-2, qmax=1, offset=0.5)
    whole = QuantizedTensor(codes=codes - 2, scale=torch.tensor([2.0]), zero_point=None, grid=half, group_size=None, dtype=torch.float32)
    assert whole.dequantize().tolist() == [[-3.0, 3.0, -1.0, 1.0]]


def test_blocks() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    assert as_blocks(x, 3).shape == (2, 2, 3)
    assert as_blocks(x, 3)[1, 0].tolist() == [6, 7, 8]
    assert as_blocks(x, None) is x
    assert as_blocks(x.t(), None, whole=True).shape == (1, 12)
    with pytest.raises(ValueError, match="group_size: got 4 for a last axis of 6"):
        as_blocks(x, 4)


def test_one_scale_for_everything_and_one_for_each_group() -> None:
    x = torch.tensor([[7.0, -1, 14, 3], [0.7, 0.1, -28, 2]])
    assert quantize_tensor(x, TensorSpec(bits=4, granularity="tensor")).scale.tolist() == [4]
    groups = quantize_tensor(x, TensorSpec(bits=4, granularity="group", group_size=2))
    torch.testing.assert_close(groups.scale, torch.tensor([[1, 2], [0.1, 4]]))
    assert groups.codes.tolist() == [[7, -1, 7, 2], [7, 1, -7, 0]]
    assert build_quantizer(TensorSpec(bits=4, granularity="token_head")).codes(x.reshape(1, 2, 2, 2)).scale.shape == (1, 2, 2)
