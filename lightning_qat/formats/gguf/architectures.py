"""Families of transformers models that a GGUF file can describe: names, metadata, and the order of rows.

Only families, and only settings of them, that the file says in full. They are those that transformers' own reader rebuilds, because every
export is read back with it. What it leaves out of what the file says, and llama.cpp reads, a config beside the file tells it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lightning_qat.registry import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one family of models is written.

    Args:
        architecture: ``general.architecture`` of the file.
        ropes: Types of rotary embeddings that llama.cpp reads for it.
        permuted: Tensors whose rows are stored with the halves of each head interleaved.
        fixed: Fields of the config for which the file has no place, and the only values they may have.
        unread: Fields that transformers' reader does not take from the file, and the values that it assumes.
    """

    architecture: str
    ropes: tuple[str, ...] = ("default", "linear")
    permuted: tuple[str, ...] = ()
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    unread: dict[str, Any] = field(default_factory=dict)


_LLAMA_PERMUTED = ("attn_q", "attn_k")
_LLAMA_ROPES = ("default", "linear", "llama3")
FAMILIES = {
    "llama": Family(
        architecture="llama",
        ropes=_LLAMA_ROPES,
        permuted=_LLAMA_PERMUTED,
        fixed={"hidden_act": ("silu",)},
        unread={"attention_bias": False, "mlp_bias": False},
    ),
    # Without a sliding window it computes what a Llama does; the file has no other word for it.
    "mistral": Family(
        architecture="llama",
        ropes=_LLAMA_ROPES,
        permuted=_LLAMA_PERMUTED,
        fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    ),
    "qwen2": Family(architecture="qwen2", fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)}),
    "qwen3": Family(
        architecture="qwen3",
        fixed={"hidden_act": ("silu",), "attention_bias": (False,), "use_sliding_window": (False,)},
        unread={"head_dim": 128},
    ),
}
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def family_of(model: Any) -> Family:
    """The family of a model.

    Raises:
        ValueError: Another family, a model without a language-modelling head, or settings the file has no place for.
    """
    config = model.config
    if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        names = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"model: got a {type(model).__name__} ({config.model_type!r}); GGUF files are written for causal language models of the "
            f"families {names}, those that transformers' GGUF reader rebuilds exactly; {did_you_mean(config.model_type, FAMILIES)}"
        )
    family = FAMILIES[config.model_type]
    for name, allowed in family.fixed.items():
        if (got := getattr(config, name)) not in allowed:
            raise ValueError(f"config.{name}: got {got!r}; a GGUF file of {family.architecture!r} has no place for it, allowed: {allowed}")
    if (rope := _rope_type(config)) not in family.ropes:
        raise ValueError(
            f"config.rope_parameters: got rope_type={rope!r}; a GGUF file of {family.architecture!r} has no place for it, "
            f"allowed: {family.ropes}"
        )
    if _head_dim(config) * config.num_attention_heads != config.hidden_size and family.architecture == "qwen2":
        raise ValueError(f"config.head_dim: got {_head_dim(config)}; a GGUF file of 'qwen2' means hidden_size / num_attention_heads")
    return family


def write_metadata(writer: Any, model: Any, family: Family) -> None:
    """The keys from which readers rebuild the config; `writer` is a ``gguf.GGUFWriter``."""
    from gguf import RopeScalingType

    config = model.config
    head_dim = _head_dim(config)
    writer.add_name(family.architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if _rope_type(config) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_quantization_version(2)


def tensor_names(model: Any, family: Family) -> Callable[[str], str]:
    """Names in the file, by name in the state dict.

    Raises:
        ValueError: When called with the name of a tensor that the file has no place for.
    """
    import gguf

    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    known = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)

    def name_of(key: str) -> str:
        stem, _, suffix = key.rpartition(".")
        if suffix not in ("weight", "bias") or (name := known.get_name(stem)) is None:
            raise ValueError(f"model: {key} has no place in a GGUF file of {family.architecture!r}")
        return f"{name}.{suffix}"

    return name_of


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer, quantizers left out, and a tied head where it is quantized as the embedding is.

    Scaled rotary frequencies of Llama 3.1 come last, as what the plain ones are divided by.
    """
    state = model.state_dict()
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    specs = [getattr(getattr(layer, "weight_quantizer", None), "spec", None) for layer in (embedding, head)]
    for name, tensor in state.items():
        is_copy = tied and name == "lm_head.weight" and specs[0] == specs[1]
        if "_quantizer." not in name and not is_copy:
            yield name, tensor
    if _rope_type(model.config) == "llama3":
        yield "rope.freqs.weight", rope_divisors(model.config)


def rope_divisors(config: Any) -> Tensor:
    """What the plain rotary frequencies are divided by to get the scaled ones, fp32 [head_dim / 2]."""
    head_dim = _head_dim(config)
    # The operations of transformers, so that frequencies which are not scaled get exactly 1.
    plain = 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    scaled, _ = ROPE_INIT_FUNCTIONS[_rope_type(config)](config)
    return plain / scaled


def unread_settings(model: Any) -> dict[str, Any]:
    """Fields of the config that the file says and transformers' reader leaves out, where they are not what it assumes."""
    config, unread = model.config, family_of(model).unread
    settings = {name: value for name, assumed in unread.items() if (value := getattr(config, name)) != assumed}
    if _rope_type(config) != "default":
        settings["rope_parameters"] = dict(config.rope_parameters)
    return settings


def row_order(model: Any, family: Family, name: str, rows: int) -> Tensor | None:
    """Which row of a tensor comes where in the file, or None where the order stays.

    transformers rotates the first half of a head against the second, ggml neighbours (for ``llama``).
    """
    config = model.config
    if not any(f".{part}." in name for part in family.permuted):
        return None
    heads = rows // _head_dim(config)
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _rope_type(config: Any) -> str:
    kind: str = config.rope_parameters.get("rope_type", "default")
    return kind


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
