"""Families of models in GGUF files; what transformers' reader leaves out of a file is said by a config beside it."""

import json
import math

import pytest
import torch
from byte_tokenizers import ROWS, byte_tokenizer
from models import SIZES, _build, llama, llama3, qwen3
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.formats.gguf import format as room

gguf = pytest.importorskip("gguf")

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": ROWS}
LLAMA3 = llama3().config.rope_parameters
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def mistral(**changes):
    return _build(MistralForCausalLM, MistralConfig, **SIZES | SHAPE | {"sliding_window": None, "tie_word_embeddings": False} | changes)


def qwen2(**changes):
    return _build(Qwen2ForCausalLM, Qwen2Config, **SIZES | SHAPE | {"tie_word_embeddings": False} | changes)


def half_llama3():
    model = llama3(**SHAPE)
    for parameter in model.parameters():  # not model.to, which rounds the rotary frequencies too
        parameter.data = parameter.data.bfloat16()
    return model


FAMILIES = {
    "llama3": (lambda: llama3(**SHAPE), True),
    "llama3-untied": (lambda: llama3(**SHAPE, tie_word_embeddings=False), True),
    "llama3-bf16": (half_llama3, True),
    "linear": (lambda: llama(**SHAPE, rope_parameters=LINEAR), True),
    "linear-qwen2": (lambda: qwen2(rope_parameters=LINEAR), True),
    "biases": (lambda: llama(**SHAPE, attention_bias=True, mlp_bias=True), True),
    "mistral": (mistral, False),
    "mistral-llama3": (lambda: mistral(rope_parameters=LLAMA3), True),
    "mistral-head-dim": (lambda: mistral(head_dim=32), False),
    "qwen3-head-dim": (lambda: qwen3(**SHAPE), True),
}


def exported(model, folder, scheme="gguf-q4_0"):
    insert_quantizers(model, scheme, allow_partial=True)
    return export(model, folder, format="gguf", tokenizer=byte_tokenizer())


def logits_of(model):
    ids = torch.randint(ROWS, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize(("build", "has_config"), FAMILIES.values(), ids=FAMILIES)
def test_what_is_loaded_is_what_was_trained(build, has_config, tmp_path):
    model = build()
    folder = exported(model, tmp_path / "out")
    verified = json.loads((folder / "manifest.json").read_text())["verification"]
    assert (verified["codes_different"], verified["scales_different"], verified["max_logit_difference"]) == (0, 0, 0.0)
    assert torch.equal(logits_of(load_quantized(folder)), logits_of(model))
    assert (folder / "config.json").exists() == has_config
    if not has_config:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=model.dtype)
        assert isinstance(loaded, LlamaForCausalLM)  # a Mistral without a sliding window is one
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_transformers_needs_the_config_that_the_model_card_names(tmp_path):
    model = llama3(**SHAPE)
    folder = exported(model, tmp_path / "out")
    assert 'gguf_file="model.gguf", config=AutoConfig.from_pretrained("folder"))' in (folder / "README.md").read_text()
    read = {"gguf_file": "model.gguf", "dtype": torch.float32}
    with_config = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder), **read)
    assert torch.equal(logits_of(with_config), logits_of(model))
    alone = AutoModelForCausalLM.from_pretrained(folder, **read)
    assert not torch.allclose(logits_of(alone), logits_of(model), atol=0.1)


def test_transformers_does_not_load_other_heads_of_qwen3_from_the_file_alone(tmp_path):
    folder = exported(qwen3(**SHAPE), tmp_path / "out")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf")


def test_rotary_frequencies_are_divided_as_in_llama_3(tmp_path):
    """Short waves stay, long ones are stretched by the factor, between them the frequency is a mean of both."""
    rope = LLAMA3 | {"original_max_position_embeddings": 64}
    folder = exported(llama3(**SHAPE, rope_parameters=rope), tmp_path / "out")
    tensor = next(tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors if tensor.name == "rope_freqs.weight")
    assert (tensor.tensor_type.name, tensor.shape.tolist()) == ("F32", [8])
    expected = []
    for index in range(8):
        turns = 64 * 500_000 ** (-2 * index / 16) / (2 * math.pi)  # in the original context
        share = min(max((turns - 1) / (4 - 1), 0), 1)
        expected.append(1 / (share + (1 - share) / 8))
    assert tensor.data.tolist() == pytest.approx(expected, rel=1e-6)
    assert (tensor.data[0], tensor.data[-1]) == (1.0, 8.0)
    assert 1 < tensor.data[1] < 8


def test_linear_scaling_is_metadata(tmp_path):
    folder = exported(llama(**SHAPE, rope_parameters=LINEAR), tmp_path / "out")
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert "rope_freqs.weight" not in {tensor.name for tensor in reader.tensors}


def test_a_tied_head_with_a_grid_of_its_own_stays_its_own(tmp_path):
    """The file has both then, so the config beside it must not tie them."""
    weight = TensorSpec(bits=4, granularity="group", group_size=32, scale_dtype="float16")
    model = llama3(**SHAPE)
    folder = exported(model, tmp_path / "out", QuantScheme(weight=weight, exclude=("type:Embedding",)))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits_of(load_quantized(folder)), logits_of(model))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: llama(**SHAPE, rope_parameters=YARN), r"rope_type='yarn'.*'llama' has no place.*'default', 'linear', 'llama3'"),
        (lambda: qwen2(rope_parameters=LLAMA3), r"rope_type='llama3'.*'qwen2' has no place.*allowed: \('default', 'linear'\)"),
        (lambda: mistral(sliding_window=16), r"config.sliding_window: got 16.*no place.*\(None,\)"),
        (lambda: mistral(hidden_act="gelu"), r"config.hidden_act: got 'gelu'"),
    ],
    ids=["yarn", "qwen2-llama3", "sliding", "activation"],
)
def test_settings_without_a_place_are_refused(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        exported(build(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", ["tensor", "config"])
def test_damaged_factors_are_found_before_the_folder_gets_its_name(damaged, tmp_path, monkeypatch):
    write = room.GgufFormat.write

    def damage(self, job, folder):
        entries = write(self, job, folder)
        file = folder / ("model.gguf" if damaged == "tensor" else "config.json")
        content = bytearray(file.read_bytes())
        if damaged == "tensor":
            tensor = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
            content[tensor.data_offset + 4] ^= 1
        else:
            content = content.replace(b'"factor": 8.0', b'"factor": 7.0')
        file.write_bytes(content)
        return entries

    monkeypatch.setattr(room.GgufFormat, "write", damage)
    with pytest.raises(RuntimeError, match=r"rope.freqs.weight reads back|export:"):
        exported(llama3(**SHAPE), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
