"""The torchao format: transformers and torchao read back exactly what was trained, or the export is refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import cnn, gpt2, llama, logits_of, mixtral, mlp, opt, qwen3, save_causal_lm, tied_llama, token_ids
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

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
    "float-zero-points": (llama, weights(bits=4, symmetric=False, zero_point="float"), r"weight\.zero_point: got 'float', executed is 'integer'"),
    "other-axis": (mlp, weights(bits=4, axis=1), r"weight\.axis: got 1"),
    "inputs-alone": (llama, QuantScheme(input=A8), r"q_proj: its input is quantized and its weight is not"),
    "bf16-fp32-scales": (bf16_llama, "w4", r"weight\.scale_dtype: this format stores scales as bfloat16, which would round them"),
    "bf16-inputs": (bf16_llama, with_a8(bits=4, scale_dtype="bfloat16"), r"the model is bfloat16.*export model\.float\(\), or export with drop"),
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
    monkeypatch.setattr(files, "save_file", lambda tensors, *a, **k: save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, *a, **k))
    with pytest.raises(ValueError, match=r"transformers cannot place every tensor.*missing_keys.*lm_head"):
        export(quantized(), tmp_path / "out", format="torchao")


@settings(max_examples=25, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 7),
    groups=st.integers(1, 3),
    size=st.integers(2, 9),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 999),
)
def test_odd_shapes_of_every_width(tmp_path_factory, bits, rows, groups, size, symmetric, scale_dtype, seed):
    def build():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(groups * size, rows))

    spec = TensorSpec(bits=bits, granularity="group", group_size=size, symmetric=symmetric, scale_dtype=scale_dtype)
    model = build()
    insert_quantizers(model, QuantScheme(weight=spec, input=A8))
    x = torch.randn(3, 2, groups * size) * 10
    x[0, 0], x[1, 1] = 0, x[1, 1].abs()  # no range, and a range that does not reach below 0
    folder = export(model, tmp_path_factory.mktemp("odd") / "out", format="torchao", example_inputs=x)
    loaded = load_quantized(folder, model=build())
    assert torch.equal(loaded(x), model(x))


# ---------------------------------------------------------------- models of one's own, models of others


class Own(nn.Module):
    """A parameter without a dot in its name, tied layers, buffers of both kinds."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.gain = nn.Parameter(torch.rand(()))
        self.register_buffer("shift", torch.rand(16))
        self.register_buffer("turn", torch.rand(16), persistent=False)
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x) * self.turn) * self.gain + self.shift


def test_a_module_of_ones_own_is_filled(tmp_path):
    model = quantized(Own, with_a8(bits=4))
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.turn.add_(1)
    folder = export(model, tmp_path / "out", format="torchao", example_inputs=torch.randn(2, 16))
    loaded = load_quantized(folder, model=Own())
    x = torch.randn(4, 16)
    assert torch.equal(loaded(x), model(x))
    assert loaded.second.weight is loaded.first.weight
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(["gain", "shift", "turn", *(f"first._weight_{part}" for part in ("qdata", "scale", "zero_point"))])
    with pytest.raises(ValueError, match=r"this is a Own of your own; pass model="):
        load_quantized(folder)
    with pytest.raises(ValueError, match=r"the given Own is quantized already"):
        load_quantized(folder, model=quantized(Own, "w4"))
    with pytest.raises(ValueError, match=r"the given Sequential holds '0\.bias', the export does not"):
        load_quantized(folder, model=mlp())


def test_an_instance_of_another_shape_is_refused_and_left_alone(tmp_path):
    folder = export(quantized(mlp, "w4"), tmp_path / "out", format="torchao")
    other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 9))
    before = other[0].weight.clone()
    with pytest.raises(ValueError, match=r"2\.bias has shape \(9,\) in the given model, \(8,\) in the export"):
        load_quantized(folder, model=other)
    assert torch.equal(other[0].weight, before)


def test_a_loaded_native_export_is_written_again(tmp_path):
    model = quantized(tied_llama, MIXED)
    packed = load_quantized(export(model, tmp_path / "native"))
    loaded = load_quantized(export(packed, tmp_path / "out", format="torchao"))
    assert torch.equal(logits_of(loaded), logits_of(model))
    own = load_quantized(export(quantized(mlp, "w4"), tmp_path / "own"), model=mlp())
    again = load_quantized(export(own, tmp_path / "again", format="torchao"), model=mlp())
    assert torch.equal(logits_of(again), logits_of(own))


def test_a_loaded_model_generates_and_pickles_nothing(tmp_path):
    model = LlamaForCausalLM.from_pretrained(save_causal_lm(llama(), tmp_path / "float"))
    insert_quantizers(model, with_a8(bits=4))
    folder = export(model, tmp_path / "out", format="torchao")
    loaded = load_quantized(folder)
    assert isinstance(loaded, LlamaForCausalLM)
    assert not any(module.training for module in loaded.modules())
    ids = token_ids(2, 4)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), model.generate(ids, max_new_tokens=8, do_sample=False))
    assert (folder / "tokenizer.json").is_file()
    loaded.save_pretrained(tmp_path / "again", save_original_format=False)
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(tmp_path / "again")), logits_of(model))
    torch.save(loaded.state_dict(), tmp_path / "state.pt")
    weight = torch.load(tmp_path / "state.pt", weights_only=True)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight.qdata, loaded.model.layers[0].mlp.up_proj.weight.qdata)
    with pytest.raises(ValueError, match="trainable: .* is a 'torchao' export"):
        load_quantized(folder, trainable=True)
