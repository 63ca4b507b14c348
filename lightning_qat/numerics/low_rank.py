"""A weight plus a product of two thin matrices, the same bits wherever it is computed: LoRA (arXiv 2106.09685), W + scaling * B A.

One operator, so that autocast does not round the product, a compiler does not fuse it, and `torch.set_float32_matmul_precision` does not
shorten it: what is trained has to be what a merge computes later.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def _exact_products(device: str) -> Iterator[None]:
    """Products of fp32 matrices in fp32 (the settings are those of CUDA and of oneDNN on the CPU), and no autocast."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@torch.library.custom_op("lightning_qat::add_low_rank", mutates_args=())
def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The sum W + scaling * B A, in fp32 or wider, in the order in which PEFT merges.

    Args:
        weight: Shape [out, in]; no memory is spent on its gradient where it asks for none.
        a: Shape [rank, in].
        b: Shape [out, rank].
        scaling: Factor of the product.

    Returns:
        Shape [out, in].
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with _exact_products(weight.device.type):
        return weight.to(dtype) + (b.to(dtype) @ a.to(dtype)) * scaling


@add_low_rank.register_fake
def _(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, a, b, ctx.scaling = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(a, b)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    a, b = ctx.saved_tensors
    wants_weight, wants_a, wants_b, _ = ctx.needs_input_grad
    grad_weight = grad.to(ctx.weight_dtype) if wants_weight else None
    with torch.autocast(grad.device.type, enabled=False):
        grad_a = ((b.to(grad.dtype).t() @ grad) * ctx.scaling).to(a.dtype) if wants_a else None
        grad_b = ((grad @ a.to(grad.dtype).t()) * ctx.scaling).to(b.dtype) if wants_b else None
    return grad_weight, grad_a, grad_b, None


add_low_rank.register_autograd(_gradients, setup_context=_remember)
