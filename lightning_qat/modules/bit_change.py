"""Other bits for the quantizers of a model that is being trained: same layers, same roles, same parameters.

Quantizers are replaced by new ones. What they remember goes with them; what they learned belongs to its bits and is not translated.
"""

from torch import nn

from lightning_qat.modules.insertion import SCHEME_ATTRIBUTE, scheme_of, share_inputs
from lightning_qat.modules.kv import KVQuantizer, kv_of
from lightning_qat.modules.layer import QuantLayer, named_quantizers
from lightning_qat.modules.matching import Matcher
from lightning_qat.quantizers import Quantizer, build_quantizer
from lightning_qat.scheme import QuantScheme, differences
from lightning_qat.specs import KVSpec, TensorSpec

MAY_DIFFER = ("bits", "quantizer")


def change_bits(model: nn.Module, scheme: QuantScheme) -> None:
    """Quantize with the bits of another scheme from now on, in place.

    A new quantizer is switched on or off like the one it replaces, and takes over its running range.

    Args:
        model: The module that quantizers were inserted into.
        scheme: Differs from the model's scheme in nothing but bits, and the quantizers that they need.

    Raises:
        ValueError: The model is not quantized, keeps the scales of an export, or the schemes differ in more than that
            (:func:`check_bit_change`).
    """
    present = scheme_of(model)
    if present is None:
        raise ValueError("change_bits: the model holds no quantizers; call insert_quantizers(model, scheme) first")
    check_bit_change(present, scheme)
    if scheme != present and (kept := [name for name, quantizer in named_quantizers(model) if quantizer.kept_scale is not None]):
        raise ValueError(f"change_bits: {kept[0]} keeps the scales of an export, which belong to its bits; load it with scales='found'")
    matcher = Matcher(model, scheme)
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            _change_layer(module, *matcher.layer_specs(name, module))
        elif kv_of(module) is not None and (spec := matcher.kv_spec(name, module)) is not None:
            _change_attention(module, spec)
    share_inputs(model)
    setattr(model, SCHEME_ATTRIBUTE, scheme)


def _change_layer(layer: QuantLayer, weight: TensorSpec | None, input: TensorSpec | None) -> None:
    for name, quantizer in list(layer.named_children()):
        spec = weight if name.removesuffix("_quantizer") in layer.weight_names else input
        if isinstance(quantizer, Quantizer) and spec is not None:
            setattr(layer, name, _rebuilt(quantizer, spec))
    layer.kept_weight, layer.shared_input = None, None


def _change_attention(module: nn.Module, spec: KVSpec) -> None:
    for child in module.children():
        if isinstance(child, KVQuantizer):
            child.spec, child.quantizer = spec, _rebuilt(child.quantizer, spec.tensor)


def _rebuilt(quantizer: Quantizer, spec: TensorSpec) -> Quantizer:
    if quantizer.spec == spec:
        return quantizer
    new = build_quantizer(spec).train(quantizer.training)
    new.enabled, new.running = quantizer.enabled, quantizer.running
    return new


def check_bit_change(before: QuantScheme, after: QuantScheme) -> None:
    """Whether a model can go from one scheme to another while it is trained.

    Raises:
        ValueError: They differ in more than bits, or a quantizer that learns or remembers something is in the way.
    """
    one, other = before.to_dict(), after.to_dict()
    pairs = [(one, other), *zip(one["overrides"], other["overrides"], strict=False)]
    for a, b in pairs:
        for role in ("weight", "input", "kv"):
            if isinstance(a[role], dict) and isinstance(b[role], dict):
                _check_part(role, a[role], b[role])
                for field in MAY_DIFFER:
                    b[role][field] = a[role][field]
    if changed := differences(one, other, "before"):
        raise ValueError("only bits may change, in the same layers and for the same tensors:\n  " + "\n  ".join(changed))


def _check_part(role: str, a: dict[str, object], b: dict[str, object]) -> None:
    if all(a[field] == b[field] for field in MAY_DIFFER):
        return
    if a["quantizer"] != b["quantizer"] and not a.get("dynamic", True):
        raise ValueError(f"{role}.dynamic: a running range of {a['quantizer']!r} has no meaning for {b['quantizer']!r}; keep the quantizer")
    kind = KVSpec if role == "kv" else TensorSpec
    for part in (a, b):
        spec = kind(**part)  # type: ignore[arg-type]
        tensor = spec.tensor if isinstance(spec, KVSpec) else spec
        if build_quantizer(tensor).learns:
            raise ValueError(f"{role}.quantizer: {tensor.quantizer!r} learns parameters, which have no meaning at other bits")
