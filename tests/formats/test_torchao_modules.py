"""The torchao format beyond fresh models of transformers: odd shapes, modules of one's own, what was loaded, what comes next."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama, logits_of, mlp, save_causal_lm, tied_llama, token_ids
from safetensors import safe_open
from torch import nn
from transformers import LlamaForCausalLM

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.scheme import Override

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore:export. no tokenizer:UserWarning")

A8 = TensorSpec(bits=8, granularity="token", symmetric=False, round_via="reciprocal")
MIXED = QuantScheme(weight=TensorSpec(bits=4), input=A8, overrides=(Override(names=("down_proj",), weight=TensorSpec(bits=8), input=None),))


def with_a8(**fields):
    return QuantScheme(weight=TensorSpec(**fields), input=A8)


def quantized(build=llama, scheme="w4"):
    model = build()
    insert_quantizers(model, scheme)
    return model


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
        assert sorted(file.keys()) == sorted(
            ["gain", "shift", "turn", *(f"first._weight_{part}" for part in ("qdata", "scale", "zero_point"))]
        )
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
    with pytest.raises(ValueError, match=r"trainable: .* is a 'torchao' export"):
        load_quantized(folder, trainable=True)
