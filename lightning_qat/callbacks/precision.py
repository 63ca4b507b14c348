"""What half precision weights lose: an optimizer's update that is smaller than half the distance between two floats rounds to nothing.

bf16 has 8 significant bits: between 2^e and 2^(e+1) its floats are 2^(e-7) apart, so an update below 2^(e-8) is lost. The update of an
Adam-like optimizer is about the learning rate; at 2e-5 every weight from 2^-7 on stays where it is (a weight of exactly 2^-7 can still
shrink: floats below a power of two are twice as dense).
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_qat.modules.weights import layer_weights

SIGNIFICANT_BITS = {torch.bfloat16: 8, torch.float16: 11}


def lost_exponent(lr: float, dtype: torch.dtype) -> int:
    """The smallest e such that an update of size `lr` is lost by weights of `dtype` from 2^e on."""
    return math.frexp(lr)[1] + SIGNIFICANT_BITS[dtype]


def warn_lost_updates(trainer: pl.Trainer, root: nn.Module) -> None:
    """Warn, once, when half precision weights are trained by an Adam-like optimizer that rounds to nearest.

    The share of weights is that of this rank where weights are sharded.

    Args:
        trainer: With its optimizers.
        root: The quantized model.

    Raises:
        MisconfigurationException: float16 weights and an ``eps`` that is 0 in float16: where a gradient is 0, the update is 0 / 0.
    """
    quantized = {id(getattr(weight.layer, weight.parameter)) for weight in layer_weights(root)}
    settings, counts, total = set(), [], 0
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            weights = [p for p in group["params"] if id(p) in quantized and p.dtype in SIGNIFICANT_BITS]
            if not weights or "betas" not in group or _rounds_stochastically(optimizer, weights[0].dtype):
                continue
            _check_eps(optimizer, group, weights[0].dtype)
            if (lr := largest_lr(group)) == 0:
                continue
            for weight in (p.to_local() if isinstance(p, DTensor) else p for p in weights):
                exponent = lost_exponent(lr, weight.dtype)
                settings.add((str(weight.dtype).removeprefix("torch."), lr, exponent))
                counts.append((weight.detach().abs() >= 2.0**exponent).sum())
                total += weight.numel()
    lost = sum(int(count) for count in counts)
    if lost == 0:
        return
    named = "; ".join(f"{dtype} at lr {lr:g}: every |w| >= 2^{exponent}" for dtype, lr, exponent in sorted(settings))
    rank_zero_warn(
        f"Weights are stored in half precision, and updates of the optimizer's size are rounded away ({named}): {lost / total:.0%} of the "
        "quantized weights are not trained now. Use precision='bf16-mixed', or an optimizer that rounds stochastically, such as "
        "torchao.optim.AdamW8bit(..., bf16_stochastic_round=True)"
    )


def largest_lr(group: dict[str, Any]) -> float:
    """The learning rate a parameter group reaches: a warm-up begins near 0, its goal is what schedulers keep beside it."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)


def _rounds_stochastically(optimizer: Optimizer, dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and bool(getattr(optimizer, "bf16_stochastic_round", False))


def _check_eps(optimizer: Optimizer, group: dict[str, Any], dtype: torch.dtype) -> None:
    """Torch's own optimizers compute in the dtype of the weights unless they are fused."""
    in_half = dtype == torch.float16 and type(optimizer).__module__.startswith("torch.optim") and not group.get("fused")
    if in_half and torch.tensor(group["eps"], dtype=dtype) == 0:
        raise MisconfigurationException(
            f"{type(optimizer).__name__}.eps: got {group['eps']:g}, which is 0 in the float16 of the weights: a weight whose gradient is 0 "
            "becomes NaN. Use precision='16-mixed' or 'bf16-mixed', fused=True, or eps=1e-4"
        )
