"""The layout that vLLM runs. vLLM itself is not here: files are read by compressed-tensors, outputs compared through transformers."""

import json

import pytest
import torch
from models import gpt2, logits_of, token_ids
from safetensors.torch import load_file
from serving import in_half, quantized, wide_llama
from transformers import AutoModelForCausalLM

from lightning_qat import KVSpec, QuantScheme, TensorSpec, export, load_quantized
from lightning_qat.formats.exactness.codes import integer_weights
from lightning_qat.modules import named_quantizers
from lightning_qat.modules.layer import quant_layers
from lightning_qat.numerics.grid import decode
from lightning_qat.quantizers.running_range import merge_ranges
from lightning_qat.scheme import Override

W4, W8 = TensorSpec(bits=4), TensorSpec(bits=8)
A8 = TensorSpec(bits=8, granularity="token")
STATIC = TensorSpec(bits=8, granularity="tensor", dynamic=False)
GROUPS = TensorSpec(bits=4, granularity="group", group_size=32)
WEIGHT_ONLY = {"vllm-w4a16": "vllm-w4a16", "w8": "w8", "w4g32": "w4g32", "w3": "w3", "w2": "w2"}
WITH_INPUTS = {
    "vllm-w8a8": ("vllm-w8a8", 127),
    "w4a8": ("w4a8", 7),
    "w2a8": ("w2a8", 3),
    "mixed": (QuantScheme(weight=W8, input=A8, overrides=(Override(names=("down_proj",), weight=GROUPS, input=None),)), 127),
}


def fitted(scheme, build=wide_llama):
    return quantized(build, QuantScheme.parse(scheme, target="vllm"))


@pytest.mark.parametrize("build", [wide_llama, in_half(wide_llama)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_weights_alone_are_packed_and_exact(build, scheme, tmp_path):
    model = fitted(scheme, build)
    folder = export(model, tmp_path / "out", format="vllm")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(loaded), logits_of(model))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert "outputs_compared_on" not in json.loads((folder / "manifest.json").read_text())["verification"]


@pytest.mark.parametrize("build", [wide_llama, in_half(wide_llama)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("scheme", "largest"), WITH_INPUTS.values(), ids=WITH_INPUTS)
def test_weights_for_integer_products_are_int8_whatever_their_bits(build, scheme, largest, tmp_path):
    model = fitted(scheme, build)
    folder = export(model, tmp_path / "out", format="vllm")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    multiplied = [group for group in config["config_groups"].values() if "input_activations" in group]
    assert [(group["format"], group["weights"]["num_bits"], group["weights"]["strategy"]) for group in multiplied] == [
        ("int-quantized", 8, "channel")
    ]
    layers = dict(quant_layers(model))
    for weight in integer_weights(model):
        if layers[weight.name].input_quantizer is not None:
            assert tensors[f"{weight.name}.weight"].dtype == torch.int8
            assert torch.equal(tensors[f"{weight.name}.weight"], weight.codes)
            assert weight.codes.abs().max() == largest
    found = json.loads((folder / "manifest.json").read_text())["verification"]
    assert (found["codes_different"], found["max_logit_difference"]) == (0, 0.0)
    assert "vLLM was not run" in found["outputs_compared_on"]


def test_inputs_are_those_of_the_kernel_but_for_ties():
    """scale = amax / 127, codes = rint(x * (127 / amax)) in fp32, whatever the dtype of x; the product comes back as codes * scale."""
    x = torch.randn(400, 512, dtype=torch.bfloat16)
    (quantizer,) = {type(q): q for name, q in named_quantizers(fitted("vllm-w8a8")) if name.endswith("input_quantizer")}.values()
    mine = quantizer.codes(x)
    amax = x.float().abs().amax(-1, keepdim=True)
    kernel = torch.round(x.float() * (127.0 / amax))
    assert torch.equal(mine.scale.view(-1), (amax / 127).view(-1))
    different = (mine.codes != kernel).float().mean().item()
    assert different < 1e-3, "the two reciprocals differ by an ulp, which only moves ties"
    same = mine.codes == kernel
    assert torch.equal(decode(mine.codes, mine.scale.view(-1, 1), None, mine.grid)[same], (kernel * (amax / 127))[same])


def test_static_scales_of_inputs_stay_fp32(tmp_path):
    model = fitted(QuantScheme(weight=W8, input=STATIC), in_half(wide_llama))
    model.train()(token_ids())
    merge_ranges(model.eval())
    tensors = load_file(export(model, tmp_path / "out", format="vllm") / "model.safetensors")
    running = model.model.layers[1].mlp.down_proj.input_quantizer.running
    scale = tensors["model.layers.1.mlp.down_proj.input_scale"]
    assert torch.equal(scale, torch.maximum(-running.low, running.high) / 127)


def test_scales_are_numbers_of_half_precision_in_a_float32_model_too(tmp_path):
    model = quantized(wide_llama, "w4")
    with pytest.raises(ValueError, match=r"(?s)weight.scale_dtype: this format stores scales as bfloat16.*target='vllm'"):
        export(model, tmp_path / "out", format="vllm")
    folder = export(model, tmp_path / "out", format="vllm", inexact=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["difference"]["max_abs"] > 0
    assert torch.equal(
        load_quantized(folder)(token_ids(2, 48)).logits, AutoModelForCausalLM.from_pretrained(folder)(token_ids(2, 48)).logits
    )


REFUSED = {
    "kv": (wide_llama, QuantScheme(weight=W4, kv=KVSpec(bits=8)), "kv: this format executes no quantized kv"),
    "input-bits": (wide_llama, "w4a6", "input.bits: got 6, executed is 8"),
    "input-divide": (wide_llama, "w8a8", "input.round_via: got 'divide', executed is 'reciprocal'"),
    "group-size": (wide_llama, "w4g16", "weight.group_size: got 16, executed is 128 or 64 or 32"),
    "asymmetric": (wide_llama, QuantScheme(weight=TensorSpec(bits=4, symmetric=False)), "weight.symmetric: got False"),
    "groups-with-inputs": (wide_llama, "w4g32a8", r"it has weight.granularity='group'; vLLM's int8 kernel.*drop=\('input',\)"),
    "inputs-alone": (wide_llama, "w16a8", "it has no quantized weight"),
    "embeddings": (wide_llama, QuantScheme(weight=W4, exclude=()), "model.embed_tokens: vLLM keeps embeddings and the output head"),
    "head": (wide_llama, QuantScheme(weight=W4, exclude=("type:Embedding",)), "lm_head: vLLM keeps embeddings and the output head"),
    "fused-layer": (
        wide_llama,
        QuantScheme(weight=W4, overrides=(Override(names=("k_proj",), weight=W8),)),
        "k_proj quantized otherwise than model.layers.0.self_attn.q_proj",
    ),
    "half-of-a-fused-layer": (
        wide_llama,
        QuantScheme(weight=W4, overrides=(Override(names=("up_proj",), weight=None),)),
        "up_proj quantized otherwise than model.layers.0.mlp.gate_proj",
    ),
    "conv1d": (gpt2, "w4", "transformer.h.0.attn.c_attn: it is a Conv1D"),
}


@pytest.mark.parametrize(("build", "scheme", "message"), REFUSED.values(), ids=REFUSED)
def test_what_vllm_does_not_run_is_refused_by_name(build, scheme, message, tmp_path):
    scheme = QuantScheme.parse(scheme)
    if message.startswith(("it has", "model", "lm_head", "k_proj", "up_proj", "transformer")):  # the grids fit, the layers do not
        scheme = QuantScheme.parse(scheme, target="vllm")
    with pytest.raises(ValueError, match=message):
        export(quantized(build, scheme), tmp_path / "out", format="vllm")
    assert list(tmp_path.iterdir()) == []


def test_keys_and_values_are_dropped_when_asked(tmp_path):
    model = fitted("w4a8")
    with_kv = quantized(wide_llama, QuantScheme(weight=model.model.layers[0].mlp.up_proj.weight_quantizer.spec, kv=KVSpec(bits=8)))
    folder = export(with_kv, tmp_path / "out", format="vllm", drop=("kv",))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["dropped"], manifest["verification"]["max_logit_difference"]) == (["kv"], 0.0)
    assert manifest["difference"]["max_abs"] > 0


def test_a_changed_bit_behind_the_writers_back_is_found(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def tampering(tensors, file, **kwargs):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] ^= 2
        save_file(tensors, file, **kwargs)

    monkeypatch.setattr("lightning_qat.formats.compressed_tensors.format.save_file", tampering)
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp.up_proj: 1 of .* codes read back differently"):
        export(fitted("w4a8"), tmp_path / "out", format="vllm")
    assert list(tmp_path.iterdir()) == []


def test_only_conventions_are_fitted():
    scheme = QuantScheme.parse("w4a8", target="vllm")
    assert (scheme.weight.scale_dtype, scheme.input.round_via, scheme.input.divisor) == ("bfloat16", "reciprocal", "qmax")
    with pytest.raises(ValueError, match=r"QuantScheme.kv: 'vllm' executes no quantized kv"):
        QuantScheme.parse("w4a8kv4", target="vllm")
