"""A model made to compute what a runtime executes, and how far that is from what was trained."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.formats.exactness.codes import stored_codes
from lightning_qat.formats.exactness.fitting import Fit
from lightning_qat.generation.skeleton import parameters_on_meta
from lightning_qat.modules.kv import KVQuantizer, kv_of
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.packed import PackedWeight, pack_tensors
from lightning_qat.modules.weights import layer_weights
from lightning_qat.quantizers import Quantizer, quantizers
from lightning_qat.specs import TensorSpec

Example = Mapping[str, Any]  # keyword arguments of the model's forward
SAMPLES, TOKENS = 2, 48


def example_for(model: nn.Module, given: Any) -> Example | None:
    """Keyword arguments to run a model with: what the user gave, a LightningModule's `example_input_array`, or random tokens.

    Args:
        model: The model.
        given: A tensor, a tuple of positional arguments, or a mapping of keyword arguments; None to find one.

    Returns:
        None where nothing is known; a tensor or tuple is bound to the names of the forward's first parameters.
    """
    given = getattr(model, "example_input_array", None) if given is None else given
    if given is not None:
        return _by_name(model, given)
    if not isinstance(model, PreTrainedModel) or model.main_input_name != "input_ids":
        return None
    config = model.config.get_text_config()
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (SAMPLES, length), generator=generator)
    return {"input_ids": ids}


def _by_name(model: nn.Module, given: Any) -> Example:
    if isinstance(given, Mapping):
        return dict(given)
    values = given if isinstance(given, tuple | list) else (given,)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, values, strict=False))


@torch.no_grad()
def outputs_of(model: nn.Module, example: Example) -> Tensor:
    """The logits (or the first tensor) a model returns for an example, on the CPU; the model is in eval mode for the call."""
    device = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0)).device
    arguments = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in example.items()}
    if isinstance(model, PreTrainedModel) and model.can_generate():
        arguments["use_cache"] = False
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        result = model(**arguments)
    finally:
        for module in training:
            module.training = True
    return first_tensor(result).detach().cpu()


def first_tensor(result: Any) -> Tensor:
    """The logits of an output, or its first tensor."""
    if isinstance(result, Tensor):
        return result
    if getattr(result, "logits", None) is not None:
        logits: Tensor = result.logits
        return logits
    values = result.values() if isinstance(result, Mapping) else result
    return next(first_tensor(value) for value in values if value is not None)


@contextmanager
def executing(model: nn.Module, fit: Fit) -> Iterator[None]:
    """Inside the block the model computes what a runtime executes: without dropped parts, with its conventions and its rotary tables."""
    with ExitStack() as stack:
        for name, layer in quant_layers(model):
            # A product of integer codes rounds otherwise than that of their values, and a kept weight may have other scales.
            stack.enter_context(_with(layer, int8_forward=False, kept_weight=None))
            quantizer = layer.input_quantizer
            if quantizer is not None and "input" in fit.dropped:
                stack.enter_context(_with(quantizer, enabled=False))
            elif quantizer is not None and name in fit.inputs:
                stack.enter_context(_with(layer, input_quantizer=_refitted(quantizer, fit.inputs[name])))
        for name, module in model.named_modules():
            if kv_of(module) is None:
                continue
            for part in (module.key_quantizer, module.value_quantizer):
                stack.enter_context(_executing_kv(part, fit, name))
        for weight in layer_weights(model):
            if weight.name in fit.scale_dtypes:
                packed = _with_rounded_scales(weight, fit.scale_dtypes[weight.name])
                stack.enter_context(_with(weight.layer, **{f"{weight.parameter}_quantizer": packed}))
        fresh = {} if fit.keeps_buffers else computed_anew(model)
        for full_name, buffer in fresh.items():
            owner, _, name = full_name.rpartition(".")
            stack.enter_context(_with(model.get_submodule(owner), **{name: buffer}))
        yield


def _executing_kv(part: KVQuantizer, fit: Fit, name: str) -> Any:
    if "kv" in fit.dropped:
        return _with(part.quantizer, enabled=False)
    return _with(part, quantizer=_refitted(part.quantizer, fit.kv[name].tensor) if name in fit.kv else part.quantizer)


@contextmanager
def _with(owner: nn.Module, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _refitted(quantizer: Quantizer, spec: TensorSpec) -> Quantizer:
    """The same quantizer, ranges and parameters included, on another grid."""
    other = copy.copy(quantizer)
    other.spec, other.grid = spec, quantizers.get(spec.quantizer).build_grid(spec)
    other.finder = other.build_finder()
    other.how = other.build_rounding()
    return other


def _with_rounded_scales(weight: Any, dtype: torch.dtype) -> PackedWeight:
    """The trained codes with rounded scales, which is what a runtime with such scales makes of them."""
    quantized, spec = stored_codes(weight), weight.quantizer.spec
    rounded = replace(quantized, scale=quantized.scale.to(dtype).to(quantized.scale.dtype))
    packed = PackedWeight(spec, weight.shape, quantized.dtype, pack_tensors(rounded, spec))
    return packed.to(rounded.scale.device)


def computed_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Float buffers that a checkpoint leaves out, such as rotary frequencies: a model cast to bf16 has rounded ones."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept and buffer.is_floating_point()}


def computed_anew(model: nn.Module) -> dict[str, Tensor]:
    """What a runtime that loads the model computes itself: the buffers that differ from it now."""
    here = computed_buffers(model)
    if not isinstance(model, PreTrainedModel) or not here:
        return {}
    with parameters_on_meta():
        buffers = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    fresh = {name: buffers[name].to(buffer.device) for name, buffer in here.items() if name in buffers}
    return {name: buffer for name, buffer in fresh.items() if not torch.equal(buffer, here[name])}


def difference(trained: Tensor, executed: Tensor) -> dict[str, float]:
    """How far two outputs are apart: largest difference, mean KL divergence over the last axis in nats, share of equal argmaxes."""
    left, right = trained.double(), executed.double()
    log_p, log_q = left.log_softmax(-1), right.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return {
        "max_abs": (left - right).abs().max().item() if left.numel() else 0.0,
        "kl": divergence,
        "top1_agreement": (left.argmax(-1) == right.argmax(-1)).double().mean().item(),
    }
