"""FSDP2 of a language model: each block is a group of its own, and what stands outside the blocks is one more."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_qat.modules import named_quantizers
from lightning_qat.modules.blocks import blocks_of


def shard(model: nn.Module, mesh: Any, param_dtype: torch.dtype | None, fill: Callable[[nn.Module], None]) -> None:
    """Shard a model over the ranks of a mesh, in place, one block after the other, so that no more than one is whole at a time.

    Args:
        model: A model with its quantizers in place.
        mesh: The ranks that share it, one dimension.
        param_dtype: Dtype in which weights are gathered and computed with, None for their own. Quantizers see weights in it.
        fill: Called with each part before it is sharded; gives parameters on the meta device their values.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=None if param_dtype is None else torch.float32)
    for _, quantizer in list(named_quantizers(model)):
        # What quantizers learn is fp32, always: a group has one dtype, and nothing in it may be rounded.
        if any(True for _ in quantizer.parameters()) and not isinstance(quantizer, FSDPModule):
            fully_shard(quantizer, mesh=mesh)
    for part in (*blocks_of(model), model):
        fill(part)
        # The outermost group stays whole between forward and backward: it holds the head, which the loss computes with.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=part is not model)
