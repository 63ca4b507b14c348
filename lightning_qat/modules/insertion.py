"""Insertion and removal of quantizers, on any `nn.Module`.

Everything is planned and checked before the first layer changes, so a refused insertion leaves the model as it was.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from lightning_qat.modules import conv, embedding, linear  # noqa: F401  they register their layers
from lightning_qat.modules.kv import attach_kv, cannot_quantize, detach_kv, is_attention, kv_of
from lightning_qat.modules.layer import LAYERS, QuantLayer
from lightning_qat.modules.matching import Matcher
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.modules.report import (
    MINIMUM_COVERAGE,
    InsertionReport,
    LeftAlone,
    QuantizedAttention,
    QuantizedLayer,
)
from lightning_qat.modules.shared_input import SIBLINGS, SharedInput
from lightning_qat.modules.side_doors import close_side_doors, open_side_doors
from lightning_qat.quantizers import build_quantizer
from lightning_qat.scheme import QuantScheme, differences
from lightning_qat.specs import KVSpec, TensorSpec

SCHEME_ATTRIBUTE = "quantization_scheme"


@dataclass(kw_only=True)
class _Plan:
    layers: list[tuple[str, nn.Module, TensorSpec | None, TensorSpec | None]]
    attention: list[tuple[str, nn.Module, KVSpec]]
    left_alone: list[LeftAlone]


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
    plan = _plan(model, scheme, final)
    report = _report(plan)
    if final and not allow_partial:
        _check_coverage(report, scheme)
    for _, module, weight, input in plan.layers:
        if not isinstance(module, QuantLayer):
            module.__class__ = LAYERS[type(module)]
            cast(QuantLayer, module).attach(weight, input)
    for _, module, kv in plan.attention:
        if kv_of(module) is None:
            attach_kv(module, kv)
    _share_inputs(model)
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
    packed = [name for name, m in model.named_modules() if isinstance(m, PackedWeight)]
    if packed:
        raise ValueError(f"remove_quantizers: {packed[0]} holds packed codes, there is no float weight to return to")
    for module in list(model.modules()):
        if kv_of(module) is not None:
            detach_kv(module)
        if isinstance(module, QuantLayer):
            module.detach()
        vars(module).pop(SCHEME_ATTRIBUTE, None)
        open_side_doors(module)


def scheme_of(model: nn.Module) -> QuantScheme | None:
    """The scheme a model (or a part of it) was quantized with, or None."""
    root = quantized_root(model)
    return None if root is None else getattr(model.get_submodule(root), SCHEME_ATTRIBUTE)


def quantized_root(model: nn.Module) -> str | None:
    """The dotted name (``""`` for the model itself) below which quantizers were inserted, or None."""
    roots = (name for name, module in model.named_modules() if SCHEME_ATTRIBUTE in vars(module) and _is_quantized(module))
    return next(roots, None)


def _is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantLayer) or kv_of(module) is not None for module in model.modules())


def _refuse_other_scheme(model: nn.Module, scheme: QuantScheme) -> None:
    present = scheme_of(model)
    if present is not None and present != scheme:
        changed = "\n  ".join(differences(present.to_dict(), scheme.to_dict(), "in the model"))
        raise ValueError(
            f"scheme: the model is already quantized with another scheme; use that one, or call remove_quantizers first:\n  {changed}"
        )


def _plan(model: nn.Module, scheme: QuantScheme, final: bool) -> _Plan:
    matcher = Matcher(model, scheme)
    plan = _Plan(layers=[], attention=[], left_alone=[])
    seen: set[int] = set()
    for name, module in model.named_modules():
        if is_attention(module):
            _plan_attention(plan, matcher, name, module)
        owned = {id(p): p for p in module.parameters(recurse=False) if p.ndim >= 2}
        packed = isinstance(getattr(module, "weight_quantizer", None), PackedWeight)
        if owned or packed:
            elements = sum(p.numel() for key, p in owned.items() if key not in seen)
            seen |= owned.keys()
            _plan_layer(plan, matcher, name, module, elements)
    if final:
        matcher.check_all_used([name for name, _ in model.named_modules()])
    return plan


def _plan_attention(plan: _Plan, matcher: Matcher, name: str, module: nn.Module) -> None:
    spec = matcher.kv_spec(name, module)
    if spec is None:
        return
    reason = cannot_quantize(module, spec)
    if reason:
        raise ValueError(f"{name}: {reason}")
    build_quantizer(spec.tensor)
    plan.attention.append((name, module, spec))


def _plan_layer(plan: _Plan, matcher: Matcher, name: str, module: nn.Module, elements: int) -> None:
    def leave(reason: str, on_purpose: bool) -> None:
        plan.left_alone.append(LeftAlone(name=name, type=type(module).__name__, reason=reason, elements=elements, on_purpose=on_purpose))

    weight, input = matcher.layer_specs(name, module)
    if (reason := matcher.excluded(name, module)) is not None:
        return leave(reason, True)
    if isinstance(module, QuantLayer):
        plan.layers.append((name, module, weight, input))
        return None
    cls = LAYERS.get(type(module))
    if cls is None:
        return leave(_why_not(module), False)
    if (reason := cls.check(module)) is not None:
        return leave(reason, False)
    input = input if cls.input_granularities else None
    if weight is None and input is None:
        return leave("the scheme has neither a weight nor an input spec for it", True)
    _check_specs(name, module, cls, weight, input)
    plan.layers.append((name, module, weight, input))
    return None


def _why_not(module: nn.Module) -> str:
    kind = type(module).__name__
    if kind.startswith("FSDP"):
        return "already sharded: insert quantizers before fully_shard"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention keeps its projections as bare parameters and never calls out_proj; use separate Linear layers"
    if kind == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight without calling the layer"
    if any(p.ndim == 3 for p in module.parameters(recurse=False)) and "xpert" in kind:
        return "expert weights in one 3-d parameter are not supported yet"
    bases = [base.__name__ for base in LAYERS if isinstance(module, base)]
    return f"a subclass of {bases[0]} with code of its own" if bases else "no quantized layer is registered for this type"


def _check_specs(name: str, module: Any, cls: type[QuantLayer], weight: TensorSpec | None, input: TensorSpec | None) -> None:
    columns = cls.to_matrix(module.weight).shape[1]
    if weight is not None:
        build_quantizer(weight)
        if weight.granularity not in ("channel", "group", "tensor"):
            raise ValueError(f"{name}: weight.granularity: got {weight.granularity!r}, expected 'channel', 'group' or 'tensor'")
        if weight.group_size and columns % weight.group_size:
            raise ValueError(
                f"{name}: weight.group_size: got {weight.group_size}, which does not divide the {columns} inputs of this layer; "
                "choose a divisor, or give this layer another spec through overrides"
            )
    if input is not None:
        build_quantizer(input)
        if input.granularity not in cls.input_granularities:
            raise ValueError(
                f"{name}: input.granularity: got {input.granularity!r}, {cls.float_type.__name__} takes {cls.input_granularities}"
            )
        if input.group_size and columns % input.group_size:
            raise ValueError(f"{name}: input.group_size: got {input.group_size}, which does not divide {columns} inputs")


def _report(plan: _Plan) -> InsertionReport:
    layers = [
        QuantizedLayer(name=name, type=type(module).__name__.removeprefix("Quant"), weight=weight, input=input, elements=_elements(module))
        for name, module, weight, input in plan.layers
    ]
    attention = [QuantizedAttention(name=name, type=type(module).__name__, kv=kv) for name, module, kv in plan.attention]
    inserted = sum(not isinstance(module, QuantLayer) for _, module, _, _ in plan.layers)
    inserted += sum(kv_of(module) is None for _, module, _ in plan.attention)
    return InsertionReport(layers=tuple(layers), attention=tuple(attention), left_alone=tuple(plan.left_alone), inserted=inserted)


def _elements(module: nn.Module) -> int:
    if isinstance(module, QuantLayer):
        rows, columns = module.matrix_shape()
        return rows * columns
    return module.weight.numel()  # type: ignore[operator]


def _check_coverage(report: InsertionReport, scheme: QuantScheme) -> None:
    if scheme.kv is not None and not report.attention:
        raise ValueError(
            "QuantScheme.kv: no attention module below the quantization root goes through transformers' AttentionInterface; leave kv out"
        )
    parts = [scheme.weight, scheme.input, *(part for o in scheme.overrides for part in (o.weight, o.input))]
    if any(isinstance(part, TensorSpec) for part in parts) and not report.layers:
        raise ValueError(f"QuantScheme: no layer can be quantized below the quantization root\n{report}")
    if (scheme.weight or scheme.input) and report.coverage < MINIMUM_COVERAGE:
        raise ValueError(
            f"coverage: {report.coverage:.1%} of the matrix weights in reach of the scheme can be quantized, at least "
            f"{MINIMUM_COVERAGE:.0%} is expected; exclude what you want to keep, or pass allow_partial=True\n{report}"
        )


def _share_inputs(model: nn.Module) -> None:
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
