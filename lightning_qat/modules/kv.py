"""Fake quantization of attention keys and values: LLM-QAT (arXiv 2305.17888), section 3.3.

post_rope   what a serving cache stores. The attention module is given a copy of its config that names our attention function, which
            quantizes k and v and calls the function the model had. The model's own config is never touched: masks are built as before,
            and a teacher made from the same config object stays as it is.
pre_rope    the paper's position. Hooks quantize what k_proj (or k_norm, where a model has one) and v_proj return.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_qat.quantizers import Quantizer, build_quantizer
from lightning_qat.specs import KVSpec

INTERFACE = "lightning_qat"
# Shape of k behind k_norm, where it is not [batch, tokens, heads * head_dim]: what "one scale per token" means depends on it.
NORM_LAYOUTS = {"Qwen3Attention": "bthd", "Qwen3MoeAttention": "bthd", "Gemma3Attention": "bhtd"}


def is_attention(module: nn.Module) -> bool:
    """Whether a module computes attention through transformers' AttentionInterface."""
    home = sys.modules.get(type(module).__module__)
    return "Attention" in type(module).__name__ and hasattr(module, "config") and hasattr(home, "ALL_ATTENTION_FUNCTIONS")


def cannot_quantize(module: nn.Module, spec: KVSpec) -> str | None:
    """Why this attention module cannot be quantized with `spec`, or None."""
    if spec.position == "post_rope":
        return None
    kind = type(module).__name__
    missing = [name for name in ("k_proj", "v_proj") if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        return f"kv.position: 'pre_rope' needs separate k_proj and v_proj, {kind} has no {' and no '.join(missing)}; use 'post_rope'"
    other_norms = [name for name, _ in module.named_children() if name.startswith(("k_", "key_")) and "norm" in name and name != "k_norm"]
    if other_norms:
        return f"kv.position: 'pre_rope' is not defined for the {other_norms[0]} of {kind}; use 'post_rope'"
    if spec.granularity == "token" and hasattr(module, "k_norm") and kind not in NORM_LAYOUTS:
        return f"kv.granularity: 'token' with 'pre_rope' is not defined for the k_norm of {kind}; use 'token_head' or 'post_rope'"
    return None


class KVQuantizer(nn.Module):
    """Quantizes keys or values of one attention module.

    Args:
        spec: What to do.
        layout: Axes of the tensors it will see: ``bhtd``, ``bthd`` or ``btD`` (heads side by side in the last axis).
        head_dim: Features per head.
    """

    def __init__(self, spec: KVSpec, layout: str, head_dim: int) -> None:
        super().__init__()
        self.spec, self.layout, self.head_dim = spec, layout, head_dim
        self.quantizer: Quantizer = build_quantizer(spec.tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize k or v, same shape; the last axis of what the quantizer sees is what shares a scale."""
        if not self.quantizer.enabled:
            return self.quantizer.bypass(x)
        if self.spec.granularity == "token_head":
            if self.layout == "btD":
                return self.quantizer(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            # Heads often lie side by side in memory; rows are taken as they lie there, so that nothing is copied.
            return self.quantizer(x.transpose(1, 2)).transpose(1, 2) if x.stride(1) < x.stride(2) else self.quantizer(x)
        if self.layout == "btD":
            return self.quantizer(x)
        by_token = x.transpose(1, 2) if self.layout == "bhtd" else x
        out = self.quantizer(by_token.flatten(-2)).unflatten(-1, by_token.shape[-2:])
        return out.transpose(1, 2) if self.layout == "bhtd" else out


class _QuantizeOutput:
    """Forward hook that quantizes what a projection returns; a class, so that models with it still pickle and copy."""

    def __init__(self, quantizer: KVQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.quantizer(output)


def attach_kv(module: Any, spec: KVSpec) -> None:
    """Quantize keys and values of one attention module."""
    head_dim = getattr(module, "head_dim", None) or module.config.hidden_size // module.config.num_attention_heads
    if spec.position == "post_rope":
        layouts = {"key": "bhtd", "value": "bhtd"}
    else:
        layouts = {"key": NORM_LAYOUTS.get(type(module).__name__, "btD"), "value": "btD"}
    for part, layout in layouts.items():
        setattr(module, f"{part}_quantizer", KVQuantizer(spec, layout, head_dim))
    if spec.position == "post_rope":
        module.float_config = module.config
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = INTERFACE
    else:
        producers = {"key": getattr(module, "k_norm", module.k_proj), "value": module.v_proj}
        hooks = {part: _QuantizeOutput(getattr(module, f"{part}_quantizer")) for part in producers}
        # The handles themselves, not their numbers: they pickle, and keep numbers given after unpickling from clashing with theirs.
        module.kv_hooks = [producer.register_forward_hook(hooks[part]) for part, producer in producers.items()]


def detach_kv(module: Any) -> None:
    """The inverse of :func:`attach_kv`."""
    if hasattr(module, "float_config"):
        module.config = module.float_config
        del module.float_config
    for handle in getattr(module, "kv_hooks", ()):
        handle.remove()
    if hasattr(module, "kv_hooks"):
        del module.kv_hooks
    del module.key_quantizer, module.value_quantizer


def kv_of(module: nn.Module) -> KVSpec | None:
    """The spec an attention module is quantized with, or None."""
    quantizer = getattr(module, "key_quantizer", None)
    return quantizer.spec if isinstance(quantizer, KVQuantizer) else None


def _float_attention(module: Any) -> Callable[..., Any]:
    name = module.float_config._attn_implementation
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def quantized_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention on quantized keys and values, [batch, kv heads, tokens, head_dim], through the function the model had."""
    key, value = module.key_quantizer(key), module.value_quantizer(value)
    return _float_attention(module)(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(INTERFACE, quantized_attention)
