"""compressed-tensors: transformers loads the trained integers and computes what was trained, or the export is refused."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from learned import LearnedGain
from models import gemma3, gpt2, inputs_of, llama, logits_of, mixtral, opt, qwen3, save_causal_lm, tied_llama, token_ids, vit
from safetensors.torch import load_file, save_file
from serving import in_half, quantized, wide_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lightning_qat import KVSpec, QuantScheme, TensorSpec, export, load_quantized
from lightning_qat.formats.exactness.codes import integer_weights
from lightning_qat.formats.exactness.executed import difference
from lightning_qat.modules import use_int8_forward
from lightning_qat.modules.layer import quant_layers
from lightning_qat.modules.weight_cache import cached_weights
from lightning_qat.quantizers import quantizers
from lightning_qat.quantizers.running_range import merge_ranges
from lightning_qat.scheme import DEFAULT_EXCLUDE, Override

TARGET = "compressed-tensors"
W4, A8 = TensorSpec(bits=4), TensorSpec(bits=8, granularity="token")
PRE_ROPE = {"position": "pre_rope"}
STATIC = TensorSpec(bits=8, granularity="tensor", dynamic=False)
ASYMMETRIC = TensorSpec(bits=4, granularity="group", group_size=16, symmetric=False)
MIXED = QuantScheme(
    weight=W4,
    input=A8,
    overrides=(
        Override(names=("down_proj",), weight=TensorSpec(bits=2, quantizer="mean_abs")),
        Override(names=("o_proj",), input=None),
        Override(names=("up_proj",), weight=ASYMMETRIC),
        Override(names=("gate_proj",), weight=None, input=None),
    ),
)
NO_EXPERTS = QuantScheme(weight=W4, input=A8, exclude=(*DEFAULT_EXCLUDE, "experts", "gate"))
OPT = QuantScheme(
    weight=W4, input=A8, overrides=(Override(names=("fc1", "fc2"), input=TensorSpec(bits=8, granularity="group", group_size=16)),)
)

EXACT = {
    "w4": (llama, "w4"),
    "w3": (llama, "w3"),
    "w8g16": (llama, "w8g16"),
    "w1a6-binary": (llama, "w1a6"),
    "w2a4-half-integers": (llama, "w2a4"),
    "w2-minmax": (llama, QuantScheme(weight=TensorSpec(bits=2, code_range="full"))),
    "w4-unsigned": (llama, QuantScheme(weight=TensorSpec(bits=4, code_range="unsigned"))),
    "w4-per-tensor": (llama, QuantScheme(weight=TensorSpec(bits=4, granularity="tensor"))),
    "w4a8": (llama, "w4a8"),
    "w8a8": (llama, "w8a8"),
    "a8-alone": (llama, "w16a8"),
    "asymmetric-groups": (llama, QuantScheme(weight=ASYMMETRIC)),
    "input-groups": (llama, QuantScheme(weight=W4, input=TensorSpec(bits=8, granularity="group", group_size=16))),
    "input-per-tensor": (llama, QuantScheme(weight=W4, input=TensorSpec(bits=8, granularity="tensor"))),
    "kv4": (llama, "w4a8kv4"),
    "kv4-alone": (llama, QuantScheme(kv=KVSpec(bits=4))),
    "llm-qat": (llama, "llm-qat"),
    "pre-rope-by-head": (llama, QuantScheme(weight=W4, kv=KVSpec(bits=4, **PRE_ROPE))),
    "pre-rope-alone": (llama, QuantScheme(kv=KVSpec(bits=8, granularity="token", **PRE_ROPE))),
    "mixed": (llama, MIXED),
    "embedding-and-head": (llama, QuantScheme(weight=TensorSpec(bits=3), exclude=())),
    "tied-in-floating-point": (tied_llama, "w4a8"),
    "qwen3": (qwen3, "w4a8kv4"),
    "gemma3": (gemma3, "w4a8kv4"),
    "opt": (opt, OPT),
    "mixtral-but-experts": (mixtral, NO_EXPERTS),
}
IN_BF16 = ["w3", "w2a4-half-integers", "w4a8", "asymmetric-groups", "input-groups", "kv4", "llm-qat", "mixed", "embedding-and-head"]


def fitted(build, scheme):
    return quantized(build, QuantScheme.parse(scheme, target=TARGET))


def check_exact(model, folder):
    """The library's own reading, with nothing of ours: float weights after the first forward pass, and logits."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits_of(loaded), logits_of(model))
    for name, layer in quant_layers(model):
        assert torch.equal(loaded.get_submodule(name).weight, layer.quantized_weight()), name
    return loaded


@pytest.mark.parametrize("name", EXACT)
def test_transformers_computes_what_was_trained(name, tmp_path):
    model = fitted(*EXACT[name])
    folder = export(model, tmp_path / "out", format=TARGET)
    check_exact(model, folder)
    found = json.loads((folder / "manifest.json").read_text())["verification"]
    assert (found["codes_different"], found["scales_different"], found["max_logit_difference"]) == (0, 0, 0.0)


@pytest.mark.parametrize("name", [name if name in IN_BF16[:4] else pytest.param(name, marks=pytest.mark.slow) for name in EXACT])
def test_the_same_in_half(name, tmp_path):
    build, scheme = EXACT[name]
    model = fitted(in_half(build), scheme)
    loaded = check_exact(model, export(model, tmp_path / "out", format=TARGET))
    assert loaded.dtype == torch.bfloat16


def test_the_same_in_fp16(tmp_path):
    model = fitted(in_half(llama, torch.float16), "w4a8kv4")
    assert check_exact(model, export(model, tmp_path / "out", format=TARGET)).dtype == torch.float16


@pytest.mark.parametrize("build", [llama, in_half(llama)])
def test_running_ranges_of_inputs_are_written_as_scales(build, tmp_path):
    model = fitted(build, QuantScheme(weight=W4, input=STATIC))
    model.train()
    model(token_ids())
    merge_ranges(model.eval())
    folder = export(model, tmp_path / "out", format=TARGET)
    check_exact(model, folder)
    running = model.model.layers[0].mlp.up_proj.input_quantizer.running
    scale = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.input_scale"]
    torch.testing.assert_close(scale.float(), torch.maximum(-running.low, running.high) / 127, rtol=4e-3, atol=0)


def test_learned_scales_of_inputs_are_written(tmp_path):
    quantizers.add("learned-and-served", LearnedGain)
    model = fitted(llama, QuantScheme(weight=W4, input=replace(STATIC, quantizer="learned-and-served")))
    model.train()(token_ids())
    merge_ranges(model.eval())
    for name, parameter in model.named_parameters():
        parameter.data += torch.rand(1) if name.endswith("gain") else 0
    check_exact(model, export(model, tmp_path / "out", format=TARGET))


# ---------------------------------------------------------------- what the file and the config say


def test_codes_are_packed_low_bits_first(tmp_path):
    model = fitted(llama, "w3")
    tensors = load_file(export(model, tmp_path / "out", format=TARGET) / "model.safetensors")
    for weight in integer_weights(model):
        words = tensors[f"{weight.name}.weight_packed"].tolist()
        for row, codes in zip(words, weight.codes.tolist(), strict=True):
            number = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
            assert [((number >> (3 * i)) & 7) - 4 for i in range(len(codes))] == codes
        assert f"{weight.name}.weight" not in tensors


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_every_width_and_odd_shapes_survive_packing(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), dtype=torch.int8, generator=generator)
    for row, mine in zip(pack_to_int32(codes, bits).tolist(), codes.tolist(), strict=True):
        number = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
        assert [((number >> (bits * i)) & (2**bits - 1)) - 2 ** (bits - 1) for i in range(columns)] == mine


def test_layers_of_one_scheme_are_one_group(tmp_path):
    config = json.loads((export(fitted(llama, "w4a8"), tmp_path / "out", format=TARGET) / "config.json").read_text())["quantization_config"]
    assert (config["quantization_status"], config["format"], config["ignore"]) == ("compressed", "pack-quantized", ["lm_head"])
    (group,) = config["config_groups"].values()
    assert (group["targets"], group["format"]) == (["Linear"], "pack-quantized")
    assert (group["weights"]["num_bits"], group["weights"]["strategy"], group["weights"]["symmetric"]) == (4, "channel", True)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)


def test_mixed_bits_are_groups_by_name(tmp_path):
    config = json.loads((export(fitted(llama, MIXED), tmp_path / "out", format=TARGET) / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    bits = {name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]}
    assert bits["model.layers.1.mlp.down_proj"] == 3, "half-integer levels are odd codes of one bit more"
    assert len(bits) == 12
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"}


@pytest.mark.parametrize(("scheme", "bits"), [("w4a8", 4), ("w3g32", 3), ("w2", 3), ("w8", 8)])
def test_the_file_has_its_nominal_size(scheme, bits, tmp_path):
    model = fitted(wide_llama, scheme)
    content = (export(model, tmp_path / "out", format=TARGET) / "model.safetensors").read_bytes()
    weights = list(integer_weights(model))
    coded = sum(weight.codes.numel() * bits / 8 + weight.scale.numel() * 4 + 16 for weight in weights)  # and two int64 of the shape
    others = 4 * (sum(parameter.numel() for parameter in model.parameters()) - sum(weight.codes.numel() for weight in weights))
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == coded + others


# ---------------------------------------------------------------- what is loaded


@pytest.mark.parametrize("scheme", ["w4a8kv4", "llm-qat"])
def test_a_loaded_model_generates_the_same_tokens(scheme, tmp_path):
    path = save_causal_lm(llama(), tmp_path / "float")
    model = LlamaForCausalLM.from_pretrained(path)
    model = quantized(lambda: model, QuantScheme.parse(scheme, target=TARGET))
    folder = export(model, tmp_path / "out", format=TARGET)
    loaded = load_quantized(folder)
    assert type(loaded) is LlamaForCausalLM
    ids = token_ids(2, 4)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(loaded.generate(ids, max_new_tokens=12, do_sample=False), wanted)
    assert (folder / "tokenizer.json").is_file()


def test_a_loaded_native_export_is_written_again(tmp_path):
    model = fitted(llama, "w4a8kv4")
    native = load_quantized(export(model, tmp_path / "native"))
    check_exact(model, export(native, tmp_path / "out", format=TARGET))


def test_a_vision_transformer_needs_inputs_to_look_at(tmp_path):
    inputs = TensorSpec(bits=8, granularity="token")
    scheme = QuantScheme(weight=W4, input=inputs, exclude=("*.projection",), overrides=(Override(names=("classifier",), input=None),))
    model = fitted(vit, scheme)
    with pytest.raises(ValueError, match=r"example_inputs: .*which shapes"):
        export(model, tmp_path / "out", format=TARGET)
    loaded = load_quantized(export(model, tmp_path / "out", format=TARGET, example_inputs=inputs_of(model)))
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_other_conventions_are_measured(tmp_path):
    model = quantized(llama, "w4a8kv4")
    trained = model(token_ids(2, 48)).logits
    folder = export(model, tmp_path / "out", format=TARGET, inexact=True, drop=("kv",), example_inputs={"input_ids": token_ids(2, 48)})
    manifest = json.loads((folder / "manifest.json").read_text())
    executed = load_quantized(folder)(token_ids(2, 48)).logits
    assert manifest["difference"] == difference(trained, executed)
    assert manifest["difference"]["max_abs"] > 0.01
    assert manifest["dropped"] == ["kv"]
    assert manifest["notes"][1] == "input: executed with code_range='full', divisor='half_range', arithmetic='input'"


def test_rounded_scales_are_those_of_the_reference_also_where_weights_are_kept(tmp_path):
    model = quantized(in_half(llama), "w4")
    with cached_weights(model), torch.no_grad():
        model(token_ids())
        folder = export(model, tmp_path / "out", format=TARGET, inexact=True)
    assert json.loads((folder / "manifest.json").read_text())["difference"]["max_abs"] > 0


def test_a_model_that_trains_on_integer_products_is_exported(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_qat.modules.int8.is_faster", lambda x, weight: True)
    model = fitted(llama, "w4a8")
    assert use_int8_forward(model) == {}
    assert export(model, tmp_path / "out", format=TARGET).is_dir()


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("key", ["weight_packed", "weight_scale", "input_scale"])
def test_a_changed_bit_behind_the_writers_back_is_found(key, tmp_path, monkeypatch):
    def tampering(tensors, file, **kwargs):
        name = next(name for name in tensors if name.endswith(key))
        tensors[name].view(torch.uint8).view(-1)[-2] ^= 1
        save_file(tensors, file, **kwargs)

    model = fitted(llama, QuantScheme(weight=W4, input=STATIC))
    model.train()(token_ids())
    merge_ranges(model.eval())
    monkeypatch.setattr("lightning_qat.formats.compressed_tensors.format.save_file", tampering)
    with pytest.raises(RuntimeError, match=r"reads? back differently"):
        export(model, tmp_path / "out", format=TARGET)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_would_load_random_weights_is_found(tmp_path, monkeypatch):
    from lightning_qat.formats.compressed_tensors import format as module

    whole = module.config_of
    monkeypatch.setattr(module, "config_of", lambda *args: {**whole(*args), "quantization_status": "initialized"})
    with pytest.raises(RuntimeError, match=r"does not fit the model.*weight"):
        export(fitted(llama, "w4"), tmp_path / "out", format=TARGET)
    assert list(tmp_path.iterdir()) == []


def test_no_asymmetric_inputs_because_the_library_rounds_after_adding_the_zero_point():
    steps = torch.tensor([2.5])  # x / scale, with zero point 1
    assert torch.round(steps + 1) == 4
    assert torch.round(steps) + 1 == 3


def test_gpt2_has_no_linear_layers(tmp_path):
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.c_attn: it is a Conv1D.*Linear and Embedding only"):
        export(fitted(gpt2, "w4"), tmp_path / "out", format=TARGET)
