"""What compressed-tensors cannot express although every grid fits: kinds of layers, tied weights, shapes of inputs, places of k and v."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_qat.formats.base import Job
from lightning_qat.formats.compressed_tensors.layout import input_specs, quantized_kv
from lightning_qat.formats.exactness.executed import outputs_of
from lightning_qat.formats.folder.company import model_dtype
from lightning_qat.modules import named_quantizers
from lightning_qat.modules.kv import is_attention
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.weights import layer_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_layers(job: Job, name: str) -> None:
    """Only linear layers, and embeddings that are not tied.

    Raises:
        ValueError: Another kind of layer, or a quantized weight that two layers share.
    """
    inputs = input_specs(job)
    for place, layer in quant_layers(job.model):
        quantized = any(getattr(layer, f"{weight}_quantizer") is not None for weight in layer.weight_names) or place in inputs
        if quantized and layer.float_type not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"format {name!r} cannot express {place}: it is a {layer.float_type.__name__}, and compressed-tensors stores layers of "
                "type Linear and Embedding only; leave it out of the scheme (exclude), or use format='native'"
            )
    owners: dict[int, list[str]] = {}
    for place, module in job.model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(place)
    for weight in layer_weights(job.model):
        sharing = owners[id(getattr(weight.layer, weight.parameter))]
        if weight.quantizer is not None and len(sharing) > 1:
            raise ValueError(
                f"format {name!r} cannot express {weight.name}: its weight is tied ({' and '.join(sharing)}), and the library can load a "
                "tied weight in floating point only; leave both out of the scheme (exclude), or train with tie_word_embeddings=False"
            )


def check_dtypes(job: Job, name: str) -> None:
    """One dtype, which scales and values can be computed in exactly: transformers casts all that it loads.

    Raises:
        ValueError: Another dtype, or several, but for what transformers itself keeps in float32.
    """
    model: Any = job.model
    dtype = model_dtype(model)
    if dtype not in DTYPES:
        raise ValueError(f"format {name!r}: the model is in {dtype}, allowed are float32, bfloat16 and float16; cast it and train on")
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    quantizers = tuple(f"{place}." for place, _ in named_quantizers(model))
    for key, parameter in model.named_parameters():
        own = key.startswith(quantizers) or not parameter.is_floating_point() or any(part in key for part in kept)
        if parameter.dtype != dtype and not own:
            raise ValueError(
                f"format {name!r}: {key} is in {parameter.dtype} and most of the model in {dtype}; transformers loads everything in one "
                "dtype, so cast the model to one and train on"
            )


def check_static_inputs(job: Job, name: str) -> None:
    """Refuse running ranges that have seen nothing."""
    for place, spec in input_specs(job).items():
        quantizer: Any = job.model.get_submodule(place).input_quantizer
        if not spec.dynamic and quantizer.running is not None and not bool(quantizer.running.batches > 0):
            raise ValueError(f"format {name!r}: the input of {place} has no range yet; train at least one batch before exporting")


def check_tokens(job: Job, name: str) -> None:
    """The library takes the first two axes for batch and tokens: inputs with scales per token must be [batch, tokens, features].

    Raises:
        ValueError: A layer sees inputs with another number of axes, or there is nothing to run the model with.
    """
    places = [place for place, spec in input_specs(job).items() if spec.granularity == "token"]
    if not places:
        return
    if job.example is None:
        raise ValueError(f"example_inputs: format {name!r} has to see which shapes quantized inputs have; pass some inputs of the model")
    with _axes_seen(job.model, places) as axes:
        outputs_of(job.model, job.example)
    if wrong := [place for place in places if axes.get(place, {3}) != {3}]:
        raise ValueError(
            f"format {name!r} cannot express the input of {wrong[0]}: it has {sorted(axes[wrong[0]])} axes, and the library quantizes "
            "per token only where inputs are [batch, tokens, features]; take it out of the scheme (overrides), or use granularity='group'"
        )


@contextmanager
def _axes_seen(model: nn.Module, places: list[str]) -> Iterator[dict[str, set[int]]]:
    """Inside the block, how many axes inputs of layers have."""
    axes: dict[str, set[int]] = {}

    def note(place: str) -> Any:
        return lambda module, args: axes.setdefault(place, set()).update(input.dim() for input in args[:1])

    handles = [model.get_submodule(place).register_forward_pre_hook(note(place)) for place in places]
    try:
        yield axes
    finally:
        for handle in handles:
            handle.remove()


def check_kv(job: Job, name: str) -> None:
    """Before RoPE keys and values are outputs of linear layers; after it one description holds for the whole model.

    Raises:
        ValueError: Keys pass through a norm first, attention modules differ, or the library does not know one of them.
    """
    ways = "export with drop=('kv',), or use format='native'"
    for place, _, _ in quantized_kv(job, "pre_rope"):
        module = job.model.get_submodule(place)
        if hasattr(module, "k_norm") or not all(isinstance(getattr(module, key), nn.Linear) for key in ("k_proj", "v_proj")):
            raise ValueError(
                f"format {name!r} cannot express kv.position='pre_rope' of {place}: the library quantizes what k_proj and v_proj return, "
                f"and keys of {type(module).__name__} pass through another layer after that; {ways}"
            )
    cached = quantized_kv(job, "post_rope")
    if not cached:
        return
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

    quantized = {place for place, _, _ in cached}
    there = {place: is_cached_attention_module(module) for place, module in job.model.named_modules() if is_attention(module)}
    if unknown := sorted(quantized - {place for place, known in there.items() if known}):
        raise ValueError(f"format {name!r} cannot express the kv of {unknown[0]}: the library does not know its attention; {ways}")
    if not hasattr(job.model.config.get_text_config(decoder=True), "num_key_value_heads"):  # type: ignore[union-attr, operator]
        raise ValueError(
            f"format {name!r} cannot express the kv of {type(job.model).__name__}: the library needs a config with num_key_value_heads; "
            f"{ways}"
        )
    if len({(spec, head_dim) for _, spec, head_dim in cached}) > 1 or quantized != {place for place, known in there.items() if known}:
        raise ValueError(
            f"format {name!r} cannot express kv.position='post_rope' that is not the same in every attention module; leave out overrides "
            f"of kv, {ways}"
        )
