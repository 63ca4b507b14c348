"""Keep quantized weights while nothing changes them: evaluation, generation, accumulated micro-batches, recomputation.

"Nothing changes them" is told by what changes weights and not by looking at them: fused optimizers, sharded parameters and writes through
``.data`` change weights without a trace. Values are kept, never graph nodes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_qat.modules.layer import quant_layers


def forget_weights(model: nn.Module) -> None:
    """Drop every kept weight; call it after changing weights by hand inside one of the scopes below."""
    for _, layer in quant_layers(model):
        layer.kept_weight = None


@contextmanager
def cached_weights(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Quantize each weight once inside the block.

    Kept values are dropped by any optimizer's step, by loading weights, by moving or casting the model, and by changing between training
    and evaluation. Costs one copy of the quantized weights, in the dtype of the product; not for sharded models, of which it would hold a
    full copy per rank.

    Args:
        model: A module with quantizers.
        training: Whether calls with gradients read kept values too; only where nothing but optimizers changes weights.
    """
    layers = [layer for _, layer in quant_layers(model)]

    def forget(*args: Any) -> None:
        forget_weights(model)

    forget()
    handle = register_optimizer_step_post_hook(forget)
    before = [layer.keeps for layer in layers]
    try:
        for layer in layers:
            layer.keeps = "always" if training or layer.keeps == "always" else "without_grad"
        yield
    finally:
        handle.remove()
        for layer, keeps in zip(layers, before, strict=True):
            layer.keeps = keeps
        forget()  # also where an outer block goes on: averaged weights may have been swapped in for this one
