"""Which model is planned for: named LLaMA shapes, a configuration on disk or a hub id, built without memory."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_qat.generation.teacher import read_config
from lightning_qat.modules import InsertionReport, insert_quantizers
from lightning_qat.modules.blocks import blocks_of
from lightning_qat.modules.layer import quant_layers
from lightning_qat.registry import did_you_mean
from lightning_qat.scheme import QuantScheme


@dataclass(frozen=True)
class _Llama:
    """hidden size, blocks, heads, kv heads, MLP size; the vocabulary is 32,000 (arXiv 2302.13971, 2307.09288)."""

    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    mlp: int
    hub_ids: tuple[str, ...]


SHAPES = {
    "llama-7b": _Llama(4096, 32, 32, 32, 11008, ("huggyllama/llama-7b", "meta-llama/Llama-2-7b-hf")),
    "llama-13b": _Llama(5120, 40, 40, 40, 13824, ("huggyllama/llama-13b", "meta-llama/Llama-2-13b-hf")),
    "llama-30b": _Llama(6656, 60, 52, 52, 17920, ("huggyllama/llama-30b",)),
    "llama-65b": _Llama(8192, 80, 64, 64, 22016, ("huggyllama/llama-65b",)),
    "llama-70b": _Llama(8192, 80, 64, 8, 28672, ("meta-llama/Llama-2-70b-hf",)),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model as numbers.

    Attributes:
        name: What a YAML calls its weights.
        config: Of transformers.
        report: What the scheme quantizes.
        parameters: All of them, tied ones once.
        block: Parameters of the largest block.
        root: Parameters outside the blocks: embeddings, head, last norm.
        head: Parameters of the head.
        linear: Parameters of the quantized matrices.
        widths: Inputs plus outputs of the quantized matrices together; times a rank, the parameters of LoRA.
        effective_bits: Per quantized weight, scales counted; None where the scheme quantizes no weights.
    """

    name: str
    config: Any
    report: InsertionReport
    parameters: int
    block: int
    root: int
    head: int
    linear: int
    widths: int
    effective_bits: float | None


def read_shape(model: str, scheme: str | QuantScheme) -> Shape:
    """Build a model without memory, with its quantizers.

    Args:
        model: A name from ``SHAPES``, a folder with config.json, the path of a config.json, a hub id, or ``tiny-teacher``.
        scheme: What is quantized.

    Raises:
        ValueError: Nothing is there, it is not a causal language model, or the scheme does not fit it.
    """
    name, config = _find(model)
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    blocks = blocks_of(network)
    block = max((_count(module) for module in blocks), default=0)
    inside = sum(_count(module) for module in blocks)
    head = network.get_output_embeddings().weight.numel()
    parsed = QuantScheme.parse(scheme)
    report = insert_quantizers(network, parsed)
    sizes = [layer.matrix_shape(key) for _, layer in quant_layers(network) for key in layer.weight_names]
    total = _count(network)
    return Shape(
        name=name,
        config=config,
        report=report,
        parameters=total,
        block=block,
        root=total - inside,
        head=head,
        linear=sum(rows * columns for rows, columns in sizes),
        widths=sum(rows + columns for rows, columns in sizes),
        effective_bits=parsed.effective_bits(network) if parsed.weight is not None else None,
    )


def _find(model: str) -> tuple[str, Any]:
    """(what a YAML calls it, its configuration)."""
    known = next((shape for name, shape in SHAPES.items() if model in (name, *shape.hub_ids)), None)
    if known is not None:
        return (known.hub_ids[0] if model in SHAPES else model), _config_of(known)
    path = Path(model).expanduser()
    if path.name == "config.json" and path.is_file():
        path = path.parent
    looks_like_a_name = "/" not in model and not path.exists() and model != "tiny-teacher"
    if looks_like_a_name:
        raise ValueError(f"model: got {model!r}, {did_you_mean(model, SHAPES)}; or a folder with config.json, or a hub id 'owner/name'")
    try:
        return str(path) if path.is_dir() else model, read_config(str(path) if path.is_dir() else model)
    except ValueError as error:
        raise ValueError(f"model: {str(error).removeprefix('teacher: ')}") from error


def _config_of(shape: _Llama) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        vocab_size=32_000,
        max_position_embeddings=4096 if shape.hub_ids[0].startswith("meta") else 2048,
        tie_word_embeddings=False,
    )


def shallow(config: Any, blocks: int) -> Any:
    """The same configuration with so many blocks."""
    config = copy.deepcopy(config)
    depth = config.num_hidden_layers
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(config, key, value[:blocks])  # what differs from block to block, such as layer_types
    config.num_hidden_layers = blocks
    return config


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
