"""Comparison of what a runtime's own library reads back with what was trained: bit for bit, or not at all."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.codes import IntegerWeight, integer_weights
from lightning_qat.formats.exactness.executed import executing, outputs_of


class Stored(NamedTuple):
    """What a file holds for one weight, in the terms of :class:`~lightning_qat.formats.exactness.codes.IntegerWeight`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


def weights_to_store(job: Job) -> list[IntegerWeight]:
    """Every quantized weight, with the scales that the runtime stores: those of training, rounded only where the fit says so."""
    return [_rounded(weight, job.fit.scale_dtypes.get(weight.name)) for weight in integer_weights(job.model)]


def _rounded(weight: IntegerWeight, dtype: torch.dtype | None) -> IntegerWeight:
    return weight if dtype is None else replace(weight, scale=weight.scale.to(dtype).float())


def compare_weights(job: Job, read: Callable[[IntegerWeight], Stored]) -> dict[str, Any]:
    """Count codes and scales that differ.

    Args:
        job: What was written.
        read: What the runtime's library finds for a weight.

    Raises:
        RuntimeError: Anything differs.
    """
    weights = weights_to_store(job)
    for weight in weights:
        stored = read(weight)
        zero_point = weight.zero_point
        for what, mine, theirs in (("codes", weight.codes, stored.codes), ("scales", weight.scale, stored.scale)):
            _same(weight.name, what, mine, theirs)
        if zero_point is not None and stored.zero_point is not None:
            _same(weight.name, "zero points", zero_point, stored.zero_point)
        elif (zero_point is None) != (stored.zero_point is None):
            raise RuntimeError(f"export: {weight.name}: zero points are there on one side only")
    return {"weights": len(weights), "codes_different": 0, "scales_different": 0}


def _same(name: str, what: str, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape != theirs.shape:
        raise RuntimeError(f"export: {name}: {what} have shape {tuple(mine.shape)}, read back {tuple(theirs.shape)}")
    if different := int((mine.double() != theirs.double()).sum()):
        raise RuntimeError(f"export: {name}: {different} of {mine.numel()} {what} read back differently than they were written")


def compare_outputs(job: Job, loaded: Callable[..., Any], tolerance: float = 0.0) -> dict[str, Any]:
    """Compare the outputs of what a runtime loaded with those of the fake-quantized model on that runtime's grid.

    Args:
        job: What was written; with its example.
        loaded: Takes the example's keyword arguments and returns the outputs, as a tensor.
        tolerance: Largest difference that is rounding of another kernel and not another model.

    Raises:
        RuntimeError: They differ by more.
    """
    if job.example is None:
        return {"max_logit_difference": None}
    with executing(job.model, job.fit):
        mine = outputs_of(job.model, job.example)
    theirs = loaded(**job.example)
    if mine.shape != theirs.shape:
        raise RuntimeError(f"export: outputs have shape {tuple(mine.shape)}, those of the written model {tuple(theirs.shape)}")
    largest = (mine.double() - theirs.double()).abs().max().item() if mine.numel() else 0.0
    if not largest <= tolerance:
        raise RuntimeError(f"export: outputs of the written model differ from the trained one's by {largest:.3g}, allowed {tolerance:g}")
    return {"max_logit_difference": largest}
