"""What an insertion would do, and why it would not: nothing here changes a model."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_qat.modules import conv, embedding, linear  # noqa: F401  they register their layers
from lightning_qat.modules.experts import experts_class
from lightning_qat.modules.kv import cannot_quantize, is_attention, kv_of
from lightning_qat.modules.layer import LAYERS, QuantLayer
from lightning_qat.modules.lora import adapted_layers, check_adapters, lora_class
from lightning_qat.modules.matching import Matcher
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.modules.report import MINIMUM_COVERAGE, InsertionReport, LeftAlone, QuantizedAttention, QuantizedLayer
from lightning_qat.quantizers import build_quantizer
from lightning_qat.scheme import QuantScheme
from lightning_qat.specs import KVSpec, TensorSpec


@dataclass(kw_only=True)
class Plan:
    """Layers and attention modules to quantize, with their specs, and what is left alone."""

    layers: list[tuple[str, nn.Module, TensorSpec | None, TensorSpec | None]]
    attention: list[tuple[str, nn.Module, KVSpec]]
    left_alone: list[LeftAlone]


def plan_insertion(model: nn.Module, scheme: QuantScheme, final: bool) -> Plan:
    """Decide for every module with matrix weights, and every attention module, what the scheme means for it.

    Raises:
        ValueError: A spec that a layer cannot have, an adapter that cannot be quantized, or (with `final`) a pattern that matches nothing.
    """
    check_adapters(model)
    adapted = {id(layer): layer for _, layer in adapted_layers(model)}
    parts = {id(part) for layer in adapted.values() for part in layer.modules()} - adapted.keys()
    matcher = Matcher(model, scheme)
    plan = Plan(layers=[], attention=[], left_alone=[])
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in parts:  # the layer they make up stands for them
            continue
        if is_attention(module):
            _plan_attention(plan, matcher, name, module)
        own = module.parameters(recurse=False) if id(module) not in adapted else [adapted[id(module)].base_layer.weight]
        owned = {id(p): p for p in own if p.ndim >= 2}
        packed = any(isinstance(child, PackedWeight) for child in module.children())
        if owned or packed:
            elements = sum(p.numel() for key, p in owned.items() if key not in seen)
            seen |= owned.keys()
            _plan_layer(plan, matcher, name, module, elements)
    if final:
        matcher.check_all_used([name for name, _ in model.named_modules()])
    return plan


def _plan_attention(plan: Plan, matcher: Matcher, name: str, module: nn.Module) -> None:
    spec = matcher.kv_spec(name, module)
    if spec is None:
        return
    reason = cannot_quantize(module, spec)
    if reason:
        raise ValueError(f"{name}: {reason}")
    build_quantizer(spec.tensor)
    plan.attention.append((name, module, spec))


def _plan_layer(plan: Plan, matcher: Matcher, name: str, module: nn.Module, elements: int) -> None:
    def leave(reason: str, on_purpose: bool) -> None:
        plan.left_alone.append(LeftAlone(name=name, type=type(module).__name__, reason=reason, elements=elements, on_purpose=on_purpose))

    weight, input = matcher.layer_specs(name, module)
    if (reason := matcher.excluded(name, module)) is not None:
        return leave(reason, True)
    if isinstance(module, QuantLayer):
        input = input if module.input_granularities else None
        plan.layers.append((name, module, weight, input))
        return None
    cls = LAYERS.get(type(module)) or experts_class(type(module)) or lora_class(type(module))
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
        return "experts with biases, transposed weights or a forward pass of their own are not supported yet"
    bases = [base.__name__ for base in LAYERS if isinstance(module, base)]
    return f"a subclass of {bases[0]} with code of its own" if bases else "no quantized layer is registered for this type"


def _check_specs(name: str, module: Any, cls: type[QuantLayer], weight: TensorSpec | None, input: TensorSpec | None) -> None:
    if weight is not None:
        build_quantizer(weight)
        if (reason := cls.check_weight(weight)) is not None:
            raise ValueError(f"{name}: {reason}")
    if input is not None:
        build_quantizer(input)
        if input.granularity not in cls.input_granularities:
            raise ValueError(
                f"{name}: input.granularity: got {input.granularity!r}, {cls.float_type.__name__} takes {cls.input_granularities}"
            )
    for columns in (cls.to_matrix(getattr(module, parameter)).shape[1] for parameter in cls.weight_names):
        if weight is not None and weight.group_size and columns % weight.group_size:
            raise ValueError(
                f"{name}: weight.group_size: got {weight.group_size}, which does not divide the {columns} inputs of this layer; "
                "choose a divisor, or give this layer another spec through overrides"
            )
        if input is not None and input.group_size and columns % input.group_size:
            raise ValueError(f"{name}: input.group_size: got {input.group_size}, which does not divide {columns} inputs")


def report_plan(plan: Plan) -> InsertionReport:
    """The report of a plan, before it is carried out."""
    layers = [
        QuantizedLayer(name=name, type=_float_type(module).__name__, weight=weight, input=input, elements=_elements(module))
        for name, module, weight, input in plan.layers
    ]
    attention = [QuantizedAttention(name=name, type=type(module).__name__, kv=kv) for name, module, kv in plan.attention]
    inserted = sum(not isinstance(module, QuantLayer) for _, module, _, _ in plan.layers)
    inserted += sum(kv_of(module) is None for _, module, _ in plan.attention)
    return InsertionReport(layers=tuple(layers), attention=tuple(attention), left_alone=tuple(plan.left_alone), inserted=inserted)


def _float_type(module: nn.Module) -> type[nn.Module]:
    return module.float_type if isinstance(module, QuantLayer) else type(module)


def _elements(module: nn.Module) -> int:
    if isinstance(module, QuantLayer):
        return sum(math.prod(module.matrix_shape(name)) for name in module.weight_names)
    return sum(getattr(module, name).numel() for name in LAYERS[type(module)].weight_names)


def check_coverage(report: InsertionReport, scheme: QuantScheme) -> None:
    """Refuse a plan that leaves out too much of what the scheme is meant for."""
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
