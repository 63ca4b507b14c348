"""The same codes as torchao wherever both express a grid.

Where the two agree bit for bit, on fp32 tensors:

    torchao                        here
    SYMMETRIC on -8..7             code_range="full", divisor="half_range": max|x| over half of 15 steps
    SYMMETRIC on -7..7             code_range="narrow"
    ASYMMETRIC on 0..15            symmetric=False with an integer zero point
    quantize_affine                round_via="reciprocal": torchao multiplies by 1 / scale

Where they differ, and why:

    eps                            torchao raises scales to the smallest normal number, so a row of zeros has a scale above 0 there
    bf16 and fp16                  torchao divides the largest magnitude in the dtype of the input, here in fp32
    SYMMETRIC on 0..15             torchao puts zero in the middle (code 8), code_range="unsigned" at code 0
    SYMMETRIC_NO_CLIPPING_ERR      the larger of max / 7 and -min / 8; no spec says that, but codes for a given scale are the same
    code_range="full" over qmax    max|x| / 7 on -8..7 has no mapping there; codes for a given scale are the same
"""

import logging
import warnings

import pytest
import torch
from torch import Tensor

from lightning_qat import TensorSpec, quantize_tensor
from lightning_qat.numerics.blocks import Blocking
from lightning_qat.numerics.fake_quantize import quantize_with
from lightning_qat.numerics.grid import Grid

logging.disable(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
logging.disable(logging.NOTSET)

MappingType = primitives.MappingType
BLOCKS = {
    "channel": ({}, (1, 32)),
    "group": ({"granularity": "group", "group_size": 8}, (1, 8)),
    "tensor": ({"granularity": "tensor"}, (300, 32)),
    "axis": ({"axis": 1}, (300, 1)),
}
every_bits = pytest.mark.parametrize("bits", range(2, 9))
every_block = pytest.mark.parametrize("name", BLOCKS)


def tensor(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(300, 32) * 10 ** torch.empty(300, 1).uniform_(-2, 2)
    x[::5] = x[::5].abs()
    return x.to(dtype)


def limits(bits: int, kind: str) -> tuple[int, int]:
    half = 2 ** (bits - 1)
    return {"narrow": (1 - half, half - 1), "full": (-half, half - 1), "unsigned": (0, 2 * half - 1)}[kind]


def theirs(x: Tensor, mapping: object, bits: int, kind: str, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero point, codes)."""
    qmin, qmax = limits(bits, kind)
    stored = torch.uint8 if kind == "unsigned" else torch.int8
    scale, zero_point = primitives.choose_qparams_affine(x, mapping, block, stored, qmin, qmax, scale_dtype=torch.float32)
    return scale, zero_point, primitives.quantize_affine(x, block, scale, zero_point, stored, qmin, qmax)


EXPRESSED_BY_BOTH = {
    "symmetric-full": (MappingType.SYMMETRIC, "full", {"code_range": "full", "divisor": "half_range"}),
    "symmetric-narrow": (MappingType.SYMMETRIC, "narrow", {}),
    "asymmetric": (MappingType.ASYMMETRIC, "unsigned", {"symmetric": False}),
}


@every_block
@every_bits
@pytest.mark.parametrize("grid", EXPRESSED_BY_BOTH)
def test_scales_zero_points_and_codes_are_equal(grid: str, bits: int, name: str) -> None:
    mapping, kind, fields = EXPRESSED_BY_BOTH[grid]
    blocks, block = BLOCKS[name]
    x = tensor()
    scale, zero_point, codes = theirs(x, mapping, bits, kind, block)
    ours = quantize_tensor(x, TensorSpec(bits=bits, round_via="reciprocal", **fields, **blocks))
    assert torch.equal(ours.scale.flatten(), scale.flatten())
    assert ours.zero_point is None or torch.equal(ours.zero_point.flatten().int(), zero_point.flatten())
    assert ours.zero_point is not None or bool((zero_point == 0).all())
    assert torch.equal(ours.codes, codes)
    stored = torch.uint8 if kind == "unsigned" else torch.int8
    values = primitives.dequantize_affine(codes, block, scale, zero_point, stored, *limits(bits, kind), output_dtype=torch.float32)
    assert torch.equal(ours.dequantize(), values)


@every_bits
def test_division_differs_from_their_reciprocal_in_ties_only(bits: int) -> None:
    x = tensor()
    scale, _, codes = theirs(x, MappingType.SYMMETRIC, bits, "narrow", (1, 32))
    ours = quantize_tensor(x, TensorSpec(bits=bits))
    steps = x.double() / scale.double().unsqueeze(1)
    tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.equal(ours.codes[~tie], codes[~tie])
    assert bool(((ours.codes - codes).abs() <= 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_bits
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC"])
def test_codes_are_equal_for_a_given_scale_and_zero_point(mapping: str, bits: int, dtype: torch.dtype) -> None:
    """Whatever found them: this holds in every dtype, with signed asymmetric codes, and with codes whose zero is in the middle."""
    x = tensor(dtype)
    for kind in ("narrow", "full", "unsigned"):
        if kind == "unsigned" and mapping == "SYMMETRIC_NO_CLIPPING_ERR":
            continue  # divides by the smallest code, 0
        scale, zero_point, codes = theirs(x, MappingType[mapping], bits, kind, (1, 32))
        qmin, qmax = limits(bits, kind)
        grid = Grid(qmin=qmin, qmax=qmax, divisor=qmax, zero="integer", round_via="reciprocal")
        ours = quantize_with(x, scale.unsqueeze(1), zero_point.float().unsqueeze(1), grid, Blocking())
        assert torch.equal(ours.codes, codes), kind


def test_a_row_of_zeros_has_a_scale_there_and_none_here() -> None:
    x = torch.zeros(2, 8)
    scale, _, codes = theirs(x, MappingType.SYMMETRIC, 4, "full", (1, 8))
    ours = quantize_tensor(x, TensorSpec(bits=4, code_range="full", divisor="half_range"))
    assert scale.tolist() == [torch.finfo(torch.float32).smallest_normal] * 2
    assert ours.scale.tolist() == [0, 0]
    assert torch.equal(ours.codes, codes)


def test_scales_of_bfloat16_tensors_are_rounded_there() -> None:
    x = tensor(torch.bfloat16)
    scale, _, _ = theirs(x, MappingType.SYMMETRIC, 8, "narrow", (1, 32))
    ours = quantize_tensor(x, TensorSpec(bits=8)).scale
    assert not torch.equal(ours, scale)
    assert torch.equal(ours.bfloat16().float(), scale)
    assert torch.equal(quantize_tensor(x, TensorSpec(bits=8, scale_dtype="bfloat16")).scale, scale)


def test_symmetric_codes_without_sign_mean_different_grids() -> None:
    x = tensor().abs()
    scale, zero_point, _ = theirs(x, MappingType.SYMMETRIC, 4, "unsigned", (1, 32))
    ours = quantize_tensor(x, TensorSpec(bits=4, code_range="unsigned"))
    assert set(zero_point.tolist()) == {8}
    torch.testing.assert_close(scale, ours.scale * 2)
