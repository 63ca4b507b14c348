"""Roundings to fewer bits that a compiler may not leave out.

Inductor drops a cast to half precision that is cast back: more exact, and another grid. In graphs the rounding is therefore an op.
"""

import torch
from torch import Tensor

SCALE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of `dtype`, ties to even, in the dtype of `values`; what overflows becomes inf."""
    return _rounded(values, dtype) if torch.compiler.is_compiling() else values.to(dtype).to(values.dtype)


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of `dtype` as in :func:`rounded`, but what overflows becomes the largest of them; NaN stays."""
    limit = torch.finfo(dtype).max
    return rounded(torch.where(values.isnan(), values, values.clamp(-limit, limit)), dtype)


@torch.library.custom_op("lightning_qat::rounded", mutates_args=())
def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).to(values.dtype, copy=True)


@_rounded.register_fake
def _(values: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values)
