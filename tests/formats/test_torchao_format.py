"""The torchao format: transformers and torchao read back exactly what was trained, or the export is refused."""

import json

import pytest
import torch
from models import cnn, gpt2, llama, logits_of, mixtral, mlp, opt, qwen3, tied_llama, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.formats.torchao import files
from lightning_qat.modules.layer import quant_layers
from lightning_qat.scheme import Override

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore:export. no tokenizer:UserWarning")

A8 = TensorSpec(bits=8, granularity="token", symmetric=False, round_via="reciprocal")


def weights(**fields):
    return QuantScheme(weight=TensorSpec(**fields))


def with_a8(**fields):
    return QuantScheme(weight=TensorSpec(**fields), input=A8)


def bf16_llama():
    """As transformers loads it: weights in bf16, rotary frequencies in fp32."""
    model = llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def wide_llama():
    return llama(intermediate_size=64)


GROUPS = {"granularity": "group", "group_size": 16}
MIXED = QuantScheme(
    weight=TensorSpec(bits=4, **GROUPS),
    input=A8,
    overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8), input=None), Override(names=("q_proj",), weight=None, input=None)),
)
EXACT = {
    "w8": (llama, "w8"),
    "w4": (llama, "w4"),
    "w3": (llama, "w3"),
    "w2": (llama, "w2"),
    "w1": (llama, "w1"),
    "w7-per-tensor": (llama, weights(bits=7, granularity="tensor")),
    "w4-full-range": (llama, weights(bits=4, code_range="full", divisor="half_range")),
    "w4-unsigned": (llama, weights(bits=4, code_range="unsigned")),
    "w4-groups-asymmetric": (llama, weights(bits=4, symmetric=False, **GROUPS)),
    "w8-asymmetric": (llama, weights(bits=8, symmetric=False)),
    "w2-groups-bf16-scales": (llama, weights(bits=2, quantizer="mean_abs", scale_dtype="bfloat16", **GROUPS)),
    "w4-fp16-scales": (llama, weights(bits=4, scale_dtype="float16")),
    "8da4w": (wide_llama, "executorch-8da4w"),
    "w8-a8": (llama, with_a8(bits=8)),
    "w2-a8": (llama, with_a8(bits=2, symmetric=False)),
    "mixed": (llama, MIXED),
    "tied": (tied_llama, "w4"),
    "tied-all-layers-a8": (tied_llama, QuantScheme(weight=TensorSpec(bits=5), input=A8, exclude=())),
    "all-layers": (llama, QuantScheme(weight=TensorSpec(bits=5), exclude=())),
    "bf16-model": (bf16_llama, QuantScheme.parse("w4", target="torchao")),
    "bf16-model-w2": (bf16_llama, QuantScheme.parse("w2", target="torchao")),
    "bf16-model-asymmetric": (bf16_llama, weights(bits=2, symmetric=False, scale_dtype="bfloat16", **GROUPS)),
    "opt-a8": (opt, with_a8(bits=4)),
    "qwen3-a8": (qwen3, with_a8(bits=4)),
}


def quantized(build=llama, scheme="w4"):
    model = build()
    insert_quantizers(model, scheme)
    return model


@pytest.mark.parametrize(("build", "scheme"), EXACT.values(), ids=EXACT)
def test_transformers_reads_back_exactly_what_was_trained(build, scheme, tmp_path):
    model = quantized(build, scheme)
    folder = export(model, tmp_path / "out", format="torchao")
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # nothing of this library
    for name, layer in quant_layers(model):
        weight = loaded.get_submodule(name).weight
        if layer.weight_quantizer is None:
            assert type(weight) is nn.Parameter, name
            continue
        assert type(weight).__name__ == "IntxUnpackedToInt8Tensor", name
        assert weight.qdata.dtype == torch.int8
        assert torch.equal(weight.dequantize(), layer.quantized_weight()), name
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert logits_of(loaded).dtype == logits_of(model).dtype
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["verification"]["codes_different"] == manifest["verification"]["max_logit_difference"] == 0
    assert {file.suffix for file in folder.iterdir()} <= {".safetensors", ".json", ".md"}


FLOAT_ZERO = weights(bits=4, symmetric=False, zero_point="float")
REFUSED = {
    "symmetric-inputs": (llama, "w4a8", r"input\.symmetric: got True, executed is False.*round_via='reciprocal'.*drop=\('input',\)"),
    "narrow-inputs": (
        llama,
        QuantScheme(input=TensorSpec(bits=4, granularity="token", symmetric=False, round_via="reciprocal"), weight=TensorSpec(bits=4)),
        r"input\.bits: got 4, executed is 8",
    ),
    "static-inputs": (
        llama,
        QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="tensor", dynamic=False)),
        r"input\.granularity: got 'tensor', executed is 'token'",
    ),
    "kv": (llama, "w4kv4", r"kv: this format executes no quantized kv.*drop=\('kv',\)"),
    "float-zero-points": (
        llama,
        weights(bits=4, symmetric=False, zero_point="float"),
        r"weight\.zero_point: got 'float', executed is 'integer'",
    ),
    "other-axis": (mlp, weights(bits=4, axis=1), r"weight\.axis: got 1"),
    "inputs-alone": (llama, QuantScheme(input=A8), r"q_proj: its input is quantized and its weight is not"),
    "bf16-fp32-scales": (bf16_llama, "w4", r"weight\.scale_dtype: this format stores scales as bfloat16, which would round them"),
    "bf16-inputs": (
        bf16_llama,
        with_a8(bits=4, scale_dtype="bfloat16"),
        r"the model is bfloat16.*export model\.float\(\), or",
    ),
    "float64": (lambda: mlp().double(), weights(bits=4, scale_dtype="float16"), r"0: its weight is torch\.float64.*model\.float\(\)"),
    "one-feature": (lambda: nn.Sequential(nn.Linear(1, 4)), with_a8(bits=4), r"0: torchao fails on quantized inputs of one feature"),
    "conv": (cnn, "w4", r"stem: Conv2d layers have no torchao tensor here.*exclude=\('type:Conv2d',\)"),
    "conv1d": (gpt2, "w4", r"c_attn: Conv1D layers have no torchao tensor here"),
    "experts": (mixtral, "w4", r"gate_up_proj: MixtralExperts layers have no torchao tensor here"),
    "alone": (lambda: nn.Linear(8, 8), "w4", r"a layer on its own has no name"),
}


@pytest.mark.parametrize(("build", "scheme", "message"), REFUSED.values(), ids=REFUSED)
def test_what_torchao_does_not_execute_is_refused_by_name(build, scheme, message, tmp_path):
    model = quantized(build, scheme)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        export(model, tmp_path / "out", format="torchao")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scheme", "part"), [("w4kv4", "kv"), ("w4a8", "input"), (with_a8(bits=4), "input")], ids=["kv", "a8", "8da"])
def test_a_dropped_part_is_left_out_and_its_difference_measured(scheme, part, tmp_path):
    model = quantized(llama, scheme)
    folder = export(model, tmp_path / "out", format="torchao", drop=(part,), example_inputs=token_ids())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dropped"] == [part]
    apart = (logits_of(load_quantized(folder)) - logits_of(model)).abs().max().item()
    assert apart > 0.001
    assert manifest["difference"]["max_abs"] == pytest.approx(apart)


def test_other_rounding_of_inputs_is_exported_only_as_inexact(tmp_path):
    scheme = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="token", symmetric=False))
    model = quantized(llama, scheme)
    with pytest.raises(ValueError, match=r"input\.round_via: got 'divide'.*(?s:.*)inexact=True"):
        export(model, tmp_path / "out", format="torchao")
    manifest = json.loads((export(model, tmp_path / "out", format="torchao", inexact=True) / "manifest.json").read_text())
    assert manifest["notes"] == ["input: executed with round_via='reciprocal'"]
    assert manifest["difference"]["max_abs"] < 1
    assert QuantScheme.parse(scheme, target="torchao").input == A8


def test_rounding_the_scales_of_a_bf16_model_is_inexact(tmp_path):
    model = quantized(bf16_llama, "w4")
    folder = export(model, tmp_path / "out", format="torchao", inexact=True, example_inputs=token_ids())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["notes"] == ["weight: 14 weights have their scales rounded to bfloat16"]
    apart = (logits_of(load_quantized(folder)) - logits_of(model)).abs().max().item()
    assert manifest["difference"]["max_abs"] == pytest.approx(apart)
    assert apart > 0.001


def test_moving_a_model_changes_nothing(tmp_path):
    model = quantized(*EXACT["bf16-model"])
    loaded = load_quantized(export(model, tmp_path / "out", format="torchao")).to("cpu")  # torchao casts scales here
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_codes_lie_in_one_file_without_their_floats(tmp_path):
    tensors = load_file(export(quantized(wide_llama, "executorch-8da4w"), tmp_path / "out", format="torchao") / "model.safetensors")
    prefix = "model.layers.0.mlp.down_proj."
    assert {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)} == {
        "_weight_qdata",
        "_weight_scale",
        "_weight_zero_point",
    }
    assert tensors[prefix + "_weight_qdata"].shape == (32, 64)
    assert tensors[prefix + "_weight_qdata"].abs().max() == 7
    assert (tensors[prefix + "_weight_scale"].dtype, tensors[prefix + "_weight_scale"].shape) == (torch.bfloat16, (32, 2))


@pytest.mark.parametrize("part", ["qdata", "scale", "zero_point"])
def test_a_changed_bit_behind_the_writers_back_is_found(part, tmp_path, monkeypatch):
    def tampering(tensors, *args, **kwargs):
        tensors = dict(tensors)
        name = f"model.layers.1.mlp.up_proj._weight_{part}"
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.uint8)[5, -1] ^= 1
        save_file(tensors, *args, **kwargs)

    save_file = files.save_file
    monkeypatch.setattr(files, "save_file", tampering)
    found = "zero points are there on one side only" if part == "zero_point" else "1 of .* read back differently"
    with pytest.raises(RuntimeError, match=rf"up_proj: {found}"):
        export(quantized(), tmp_path / "out", format="torchao")
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_transformers_cannot_place_is_found(tmp_path, monkeypatch):
    save_file = files.save_file
    monkeypatch.setattr(
        files, "save_file", lambda tensors, *a, **k: save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, *a, **k)
    )
    with pytest.raises(ValueError, match=r"transformers cannot place every tensor.*missing_keys.*lm_head"):
        export(quantized(), tmp_path / "out", format="torchao")
