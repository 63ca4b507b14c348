"""Fake quantization is exactly what the stored codes say: every grid, every granularity, a thousand seeds in each floating-point type."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from grids import DTYPES, FAMILIES, GRANULARITIES, specs_of, thousand_seeds
from reference import code_limits, numpy_codes
from torch import Tensor

from lightning_qat import TensorSpec, fake_quantize, quantize_tensor
from lightning_qat.numerics.fake_quantize import quantize_with
from lightning_qat.numerics.grid import QuantizedTensor

every_family = pytest.mark.parametrize("family", FAMILIES)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)


def seeds(granularity: str, dtype: torch.dtype) -> Tensor:
    """One tensor of many seeds; where it has a single scale, its rows must not drown in each other."""
    x = thousand_seeds()
    if granularity == "tensor":
        x = x / x.abs().amax(-1, keepdim=True).clamp(min=1e-9)
    return x.to(dtype)


def requantized(values: Tensor, first: QuantizedTensor) -> Tensor:
    """Codes of values with the scale and zero point of `first`."""
    zero_point = None if first.zero_point is None else first.zero_point.unsqueeze(-1).to(first.scale.dtype)
    return quantize_with(values, first.scale.unsqueeze(-1), zero_point, first.grid, first.blocking).codes


def survives_rounding(spec: TensorSpec, dtype: torch.dtype) -> bool:
    """Whether values rounded to `dtype` still have their codes.

    A value is within half a step of its `x`, so where steps are shorter than the gaps of the dtype it is rounded back to `x`, and where
    they are longer it moves by less than half a step. Not so for what was clamped, which rounded scales cause: bf16 has 8 significant
    bits, so 255 steps may round to 254, and a float zero point may be far larger than a step.
    """
    if spec.scale_dtype == "float32":
        return True
    reach = max(abs(limit) for limit in code_limits(spec))
    return spec.zero_point == "integer" and not (dtype == torch.bfloat16 and reach > 128)


@every_granularity
@every_family
def test_values_are_those_of_the_codes_and_codes_those_of_the_values(family: str, granularity: str) -> None:
    """With the same scale and zero point; of values in the dtype of `x` and of values kept in fp32 (see `survives_rounding`)."""
    for dtype in DTYPES:
        x = seeds(granularity, dtype)
        for spec in specs_of(family, **GRANULARITIES[granularity]):
            first = quantize_tensor(x, spec)
            values = first.dequantize()
            assert torch.equal(fake_quantize(x, spec), values), (spec, dtype)
            low, high = code_limits(spec)
            assert low <= int(first.codes.min()), (spec, dtype)
            assert int(first.codes.max()) <= high, (spec, dtype)
            wide = replace(first, dtype=torch.float32).dequantize()
            assert torch.equal(values, wide.to(dtype)), (spec, dtype)
            assert torch.equal(requantized(wide, first), first.codes), (spec, dtype)
            if survives_rounding(spec, dtype):
                assert torch.equal(requantized(values, first), first.codes), (spec, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mean_abs"])
def test_a_thousand_seeds_against_numpy(family: str, dtype: torch.dtype) -> None:
    x = seeds("channel", dtype)
    rows = x.reshape(-1, x.shape[-1]).float().numpy()
    for spec in specs_of(family):
        scale, zero_point, codes, values = (torch.from_numpy(part) for part in numpy_codes(rows, spec))
        ours = quantize_tensor(x, spec)
        assert torch.equal(ours.scale.reshape(-1, 1), scale), spec
        assert ours.zero_point is None or torch.equal(ours.zero_point.reshape(-1, 1).to(scale.dtype), zero_point), spec
        assert torch.equal(ours.codes.reshape(codes.shape).float(), codes), spec
        assert torch.equal(ours.dequantize(), values.to(dtype).view(x.shape)), spec


def test_what_was_clamped_may_not_survive_rounding() -> None:
    """The scale 0.0041 / 255 is rounded down in fp16, so the largest value is clamped to code 255, which is code 254 once it is bf16."""
    x = torch.tensor([2.5471e-04, 1.0974e-03, 6.0e-04]).bfloat16()
    spec = TensorSpec(bits=8, code_range="unsigned", scale_dtype="float16")
    first = quantize_tensor(x, spec)
    assert not survives_rounding(spec, torch.bfloat16)
    assert first.codes.max() == 255
    assert requantized(first.dequantize(), first).max() == 254
    assert torch.equal(requantized(replace(first, dtype=torch.float32).dequantize(), first), first.codes)


@pytest.mark.parametrize("offset", [1, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_zero_points_far_from_zero(offset: int, dtype: torch.dtype) -> None:
    x = (seeds("channel", torch.float32) + offset).to(dtype)
    for spec in specs_of("float-zero"):
        if survives_rounding(spec, dtype):
            first = quantize_tensor(x, spec)
            assert torch.equal(requantized(first.dequantize(), first), first.codes), spec


@every_granularity
def test_ranging_again_changes_nothing_on_the_narrow_symmetric_grid(granularity: str) -> None:
    """The largest magnitude is a value of the grid, so the second range is the first; true of float32 scales and true division."""
    for dtype in DTYPES:
        x = seeds(granularity, dtype)
        for bits in range(2, 9):
            spec = TensorSpec(bits=bits, **GRANULARITIES[granularity])
            once = fake_quantize(x, spec)
            assert torch.equal(fake_quantize(once, spec), once), (spec, dtype)


@pytest.mark.parametrize("granularity", ["axis", "group"])
def test_a_granularity_is_the_channel_of_a_rearranged_tensor(granularity: str) -> None:
    x = seeds(granularity, torch.float32)[:100]
    if granularity == "group":
        rearranged, back = x.unflatten(-1, (3, 4)), lambda y: y.flatten(-2)
        spec = TensorSpec(bits=4, granularity="group", group_size=4)
    else:
        rearranged, back = x.permute(1, 0, 2).reshape(2, -1), lambda y: y.reshape(2, 100, 12).permute(1, 0, 2)
        spec = TensorSpec(bits=4, axis=1)
        assert torch.equal(fake_quantize(x, spec), fake_quantize(x, replace(spec, axis=-2)))
    alike = dataclasses.replace(spec, granularity="channel", group_size=None, axis=None)
    assert torch.equal(fake_quantize(x, spec), back(fake_quantize(rearranged, alike)))
