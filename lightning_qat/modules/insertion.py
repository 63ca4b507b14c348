"""Insertion and removal of quantizers, on any `nn.Module`.

Everything is planned and checked before the first layer changes, so a refused insertion leaves the model as it was.
"""

from typing import cast

from torch import nn

from lightning_qat.modules.kv import attach_kv, detach_kv, kv_of
from lightning_qat.modules.layer import LAYERS, QuantLayer
from lightning_qat.modules.packed import packed_weights
from lightning_qat.modules.planning import check_coverage, plan_insertion, report_plan
from lightning_qat.modules.report import InsertionReport
from lightning_qat.modules.shared_input import SIBLINGS, SharedInput
from lightning_qat.modules.side_doors import close_side_doors, open_side_doors
from lightning_qat.scheme import QuantScheme, differences

SCHEME_ATTRIBUTE = "quantization_scheme"
REACHED_ATTRIBUTE = "quantizers_reached"  # set once a training batch has called every quantized layer


def insert_quantizers(model: nn.Module, scheme: str | QuantScheme, *, allow_partial: bool = False, final: bool = True) -> InsertionReport:
    """Put fake quantizers into a model, in place.

    Layers change their class (`nn.Linear` becomes `QuantLinear`), so names, tied weights, hooks and references survive. Calling it again
    with the same scheme adds what is missing and changes nothing else.

    Args:
        model: Any module; names in the scheme are relative to it.
        scheme: A scheme, its string (``"w4a8kv4"``) or a preset's name.
        allow_partial: Accept that less than 90 % of the matrix weights in reach of the scheme can be quantized.
        final: Whether more layers may still be built: with False, coverage and unused patterns are not checked yet.

    Returns:
        What was quantized, what was not, and why.

    Raises:
        ValueError: Unknown scheme; a pattern that matches nothing; a group size that does not divide; a different scheme on a model that
            is quantized already; coverage below 90 %.
    """
    scheme = QuantScheme.parse(scheme)
    _refuse_other_scheme(model, scheme)
    plan = plan_insertion(model, scheme, final)
    report = report_plan(plan)
    if final and not allow_partial:
        check_coverage(report, scheme)
    for _, module, weight, input in plan.layers:
        if not isinstance(module, QuantLayer):
            module.__class__ = LAYERS[type(module)]
            cast(QuantLayer, module).attach(weight, input)
    for _, module, kv in plan.attention:
        if kv_of(module) is None:
            attach_kv(module, kv)
    share_inputs(model)
    for module in model.modules():
        if _is_quantized(module):
            close_side_doors(module)
    if report.layers or report.attention:
        setattr(model, SCHEME_ATTRIBUTE, scheme)
    return report


def remove_quantizers(model: nn.Module) -> None:
    """Take every quantizer out again; weights stay as they are now, outputs are those of the plain model bit for bit.

    Raises:
        ValueError: The model was loaded from packed codes and has no float weights to return to.
    """
    if packed := packed_weights(model):
        raise ValueError(f"remove_quantizers: {packed[0]} holds packed codes, there is no float weight to return to")
    for module in list(model.modules()):
        if kv_of(module) is not None:
            detach_kv(module)
        if isinstance(module, QuantLayer):
            module.detach()
        vars(module).pop(SCHEME_ATTRIBUTE, None)
        vars(module).pop(REACHED_ATTRIBUTE, None)
        open_side_doors(module)


def scheme_of(model: nn.Module) -> QuantScheme | None:
    """The scheme a model (or a part of it) was quantized with, or None."""
    root = quantized_root(model)
    return None if root is None else getattr(model.get_submodule(root), SCHEME_ATTRIBUTE)


def quantized_root(model: nn.Module) -> str | None:
    """The dotted name (``""`` for the model itself) below which quantizers were inserted, or None."""
    return next(iter(quantized_roots(model)), None)


def quantized_roots(model: nn.Module) -> list[str]:
    """All such names; more than one when parts of a model were quantized on their own."""
    return [name for name, module in model.named_modules() if SCHEME_ATTRIBUTE in vars(module) and _is_quantized(module)]


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantLayer) or kv_of(module) is not None for module in model.modules())


def _refuse_other_scheme(model: nn.Module, scheme: QuantScheme) -> None:
    present = scheme_of(model)
    if present is not None and present != scheme:
        changed = "\n  ".join(differences(present.to_dict(), scheme.to_dict(), "in the model"))
        raise ValueError(
            f"scheme: the model is already quantized with another scheme; use that one, or call remove_quantizers first:\n  {changed}"
        )


def share_inputs(model: nn.Module) -> None:
    """Group siblings that read the same input with the same quantizer and no gradient mask of their own."""
    for parent in model.modules():
        for names in SIBLINGS:
            children = [getattr(parent, name, None) for name in names]
            group = [c for c in children if isinstance(c, QuantLayer) and c.input_quantizer is not None]
            specs = {c.input_quantizer.spec for c in group if c.input_quantizer is not None}
            plain = all(c.input_quantizer is not None and c.input_quantizer.can_share for c in group)
            if len(group) > 1 and len(specs) == 1 and plain and group[0].shared_input is None:
                shared = SharedInput(len(group))
                for layer in group:
                    layer.shared_input = shared
