"""Every grid and granularity that a spec can ask for, and a thousand seeds in one tensor."""

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_qat import TensorSpec

SCALE_DTYPES = ("float32", "bfloat16", "float16")
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FAMILIES: dict[str, dict[str, Any]] = {
    "narrow": {},
    "full": {"code_range": "full"},
    "narrow-half": {"divisor": "half_range"},
    "full-half": {"code_range": "full", "divisor": "half_range"},
    "unsigned": {"code_range": "unsigned"},
    "integer-zero": {"symmetric": False},
    "float-zero": {"symmetric": False, "zero_point": "float"},
    "mean_abs": {"quantizer": "mean_abs"},
}
GRANULARITIES: dict[str, dict[str, Any]] = {
    "channel": {},
    "axis": {"axis": 0},
    "group": {"granularity": "group", "group_size": 4},
    "token": {"granularity": "token"},
    "token_head": {"granularity": "token_head"},
    "tensor": {"granularity": "tensor"},
}


def bits_of(family: str) -> range:
    """The bits that a family of grids has."""
    return range(1, 3) if family == "mean_abs" else range(1 if "zero" in family else 2, 9)


def specs_of(family: str, **fields: Any) -> list[TensorSpec]:
    """All bits, scale dtypes and ways of dividing of a family."""
    every = itertools.product(bits_of(family), SCALE_DTYPES, ("divide", "reciprocal"))
    return [TensorSpec(bits=b, scale_dtype=s, round_via=r, **FAMILIES[family], **fields) for b, s, r in every]


@cache
def thousand_seeds(rows: int = 2, columns: int = 12) -> Tensor:
    """Shape [1000, rows, columns]; seed i fills slice i, rows are of very different size, some elements are zero or tie."""
    slices = []
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, columns, generator=generator) * 10 ** (torch.rand(rows, 1, generator=generator) * 5 - 3)
        slices.append(x.abs() if seed % 5 == 0 else x)
    stacked = torch.stack(slices)
    stacked[1::7, :, 0] = 0.0
    stacked[2::7, :, 1] = stacked[2::7].abs().amax(-1) / 2  # 3.5 or 63.5 steps
    return stacked
