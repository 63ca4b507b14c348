"""Scales, codes and values against formulas written out in numpy, and what happens at the edges of floating point."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from reference import code_limits, numpy_codes
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.numerics.blocks import Blocking
from lightning_qat.numerics.fake_quantize import quantize_with
from lightning_qat.numerics.grid import Grid, QuantizedTensor
from lightning_qat.quantizers import build_quantizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FULL = {"code_range": "full"}
HALF = {"divisor": "half_range"}
ASYM = {"symmetric": False}
MEAN = {"quantizer": "mean_abs"}
FLOAT = {"symmetric": False, "zero_point": "float"}


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
    "unsigned": {"code_range": "unsigned"},
    "float-zero": FLOAT,
    "float-zero-bf16-scale": FLOAT | {"scale_dtype": "bfloat16"},
    "mean_abs": MEAN,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def specs(kind: str) -> list[TensorSpec]:
    """The specs of one kind, all bits it allows."""
    bits = (1, 2) if kind == "mean_abs" else range(1 if "asym" in kind or "zero" in kind else 2, 9)
    return [TensorSpec(bits=b, **KINDS[kind]) for b in bits]


def rows(dtype: torch.dtype = torch.float32, count: int = 1000, columns: int = 24) -> Tensor:
    """Many seeds in one tensor: rows of very different size."""
    return (torch.randn(count, columns) * 10 ** torch.empty(count, 1).uniform_(-3, 2)).to(dtype)


def each(kind: str) -> Iterator[tuple[TensorSpec, torch.dtype]]:
    return itertools.product(specs(kind), DTYPES)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mean_abs"])
def test_scale_zero_point_and_codes_against_numpy(kind: str) -> None:
    for spec, dtype in each(kind):
        x = rows(dtype, count=200)
        scale, zero_point, codes, values = numpy_codes(x.float().numpy(), spec)
        ours = quantize_tensor(x, spec)
        assert np.array_equal(ours.scale.numpy(), scale[:, 0]), spec
        assert np.array_equal(ours.codes.numpy(), codes), spec
        assert (ours.zero_point is None) == spec.symmetric
        assert spec.symmetric or np.array_equal(ours.zero_point.numpy(), zero_point[:, 0]), spec
        assert torch.equal(ours.dequantize(), torch.from_numpy(values).to(dtype)), spec


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
    """With the same scale: quantizing what was quantized changes no code (when it may, is in test_exactness)."""
    for spec, dtype in each(kind):
        if spec.zero_point == "float" and spec.scale_dtype != "float32":
            continue
        for x in (rows(dtype, count=500), rows(dtype, count=500).abs()):
            first = quantize_tensor(x, spec)
            zero_point = None if first.zero_point is None else first.zero_point.unsqueeze(-1).float()
            again = quantize_with(first.dequantize(), first.scale.unsqueeze(-1), zero_point, first.grid, first.blocking)
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
        # Values of float zero points are codes * scale + low, so a range wider than the largest float has none: see test_bad_input.
        wide = spec.zero_point == "float" and dtype != torch.float16
        assert y.isfinite().all(1).tolist() == [not wide, not wide, True, True], (spec, dtype)
        assert y[:2].isnan().all() or not wide, (spec, dtype)
        x, y = (x[2:], y[2:]) if wide else (x, y)
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
    pairs = Blocking(share="group", size=2)
    integer = Grid(qmin=0, qmax=3, divisor=3, zero="integer")
    table = QuantizedTensor(codes=codes, scale=scale, zero_point=zero_point, grid=integer, blocking=pairs, dtype=torch.bfloat16)
    assert table.dequantize().tolist() == [[-0.5, 1.0, 2.0, 4.0]]
    assert table.dequantize().dtype == torch.bfloat16
    value = Grid(qmin=0, qmax=3, divisor=3, zero="float")
    shifted = QuantizedTensor(codes=codes, scale=scale, zero_point=scale - 1, grid=value, blocking=pairs, dtype=torch.float32)
    assert shifted.dequantize().tolist() == [[-0.5, 1.0, 3.0, 5.0]]
    half = Grid(qmin=-2, qmax=1, divisor=1, offset=0.5)
    row = QuantizedTensor(codes=codes - 2, scale=torch.tensor([2.0]), zero_point=None, grid=half, blocking=Blocking(), dtype=torch.float32)
    assert row.dequantize().tolist() == [[-3.0, 3.0, -1.0, 1.0]]


def test_one_scale_for_everything_and_one_for_each_group() -> None:
    x = torch.tensor([[7.0, -1, 14, 3], [0.7, 0.1, -28, 2]])
    assert quantize_tensor(x, TensorSpec(bits=4, granularity="tensor")).scale.tolist() == [4]
    groups = quantize_tensor(x, TensorSpec(bits=4, granularity="group", group_size=2))
    torch.testing.assert_close(groups.scale, torch.tensor([[1, 2], [0.1, 4]]))
    assert groups.codes.tolist() == [[7, -1, 7, 2], [7, 1, -7, 0]]
    assert build_quantizer(TensorSpec(bits=4, granularity="token_head")).codes(x.reshape(1, 2, 2, 2)).scale.shape == (1, 2, 2)
