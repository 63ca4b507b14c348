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


@every_granularity
@every_family
def test_values_are_those_of_the_codes_and_codes_those_of_the_values(family: str, granularity: str) -> None:
    """For float zero points the second half holds of values kept in fp32 only; half precision cannot tell all of them apart."""
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
            if spec.zero_point == "integer":
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


def test_float_zero_points_in_half_precision() -> None:
    """How often a stored bf16 value of an 8-bit code is another code's: never with an integer zero point, often with a float one."""
    x = seeds("channel", torch.bfloat16) + 1
    for zero_point, collides in (("integer", False), ("float", True)):
        first = quantize_tensor(x, TensorSpec(bits=8, symmetric=False, zero_point=zero_point))
        assert torch.equal(requantized(first.dequantize(), first), first.codes) != collides


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
