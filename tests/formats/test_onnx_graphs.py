"""The ONNX format on small networks: what the file holds, what onnxruntime computes from it, and what is refused."""

import copy
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from models import cnn
from torch import nn

from lightning_qat import QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.quantizers.running_range import merge_ranges
from lightning_qat.scheme import Override

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GROUPS = {"granularity": "group", "group_size": 4}
STATIC = {"bits": 8, "granularity": "tensor", "dynamic": False}
WEIGHTS = {  # spec, type in the file
    "one": (TensorSpec(bits=1, quantizer="mean_abs"), "INT2"),
    "two": (TensorSpec(bits=2), "INT2"),
    "half_integers": (TensorSpec(bits=2, quantizer="mean_abs", **GROUPS), "INT4"),
    "three": (TensorSpec(bits=3, symmetric=False, granularity="tensor"), "INT4"),
    "four": (TensorSpec(bits=4, scale_dtype="bfloat16"), "INT4"),
    "four_in_groups": (TensorSpec(bits=4, symmetric=False, **GROUPS), "INT4"),
    "four_with_values": (TensorSpec(bits=4, symmetric=False, zero_point="float", **GROUPS), "UINT4"),
    "five": (TensorSpec(bits=5, code_range="unsigned"), "INT8"),
    "seven_with_values": (TensorSpec(bits=7, symmetric=False, zero_point="float"), "UINT8"),
    "eight": (TensorSpec(bits=8, code_range="full", divisor="half_range"), "INT8"),
}
INPUTS = {  # spec, whether QuantizeLinear makes the codes
    "token": (TensorSpec(bits=8, granularity="token"), False),
    "token_half_range": (TensorSpec(bits=4, granularity="token", code_range="full", divisor="half_range"), False),
    "token_reciprocal": (TensorSpec(bits=8, granularity="token", round_via="reciprocal"), False),
    "group": (TensorSpec(bits=8, **GROUPS), False),
    "tensor": (TensorSpec(bits=8, granularity="tensor"), False),
    "static": (TensorSpec(**STATIC), True),
    "static_full": (TensorSpec(**STATIC, code_range="full"), True),
    "static_asymmetric": (TensorSpec(**STATIC, symmetric=False), True),
    "static_narrow": (TensorSpec(**STATIC | {"bits": 3}, symmetric=False), True),
}
TRACED = {  # on the very formula of training, which takes longer
    "token_asymmetric": (TensorSpec(bits=8, granularity="token", symmetric=False), False),
    "token_value": (TensorSpec(bits=4, granularity="token", symmetric=False, zero_point="float"), False),
    "token_unsigned": (TensorSpec(bits=8, granularity="token", code_range="unsigned"), False),
    "token_bf16_scale": (TensorSpec(bits=8, granularity="token", scale_dtype="bfloat16"), False),
    "static_reciprocal": (TensorSpec(**STATIC, round_via="reciprocal"), False),
    "static_value": (TensorSpec(**STATIC, symmetric=False, zero_point="float"), False),
}


class Chain(nn.Module):
    """Square layers with an activation between them, 12 features each."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(12, 12) for name in names})

    def forward(self, features):
        for layer in self.layers.values():
            features = torch.tanh(layer(features))
        return features


def chain(part, specs):
    overrides = tuple(Override(names=(name,), **{part: spec}) for name, (spec, _) in specs.items())
    model = Chain(specs)
    insert_quantizers(model, QuantScheme(weight=TensorSpec(bits=8), overrides=overrides))
    return see_a_batch(model, torch.randn(5, 3, 12) / 10)  # so that examples leave static ranges


def see_a_batch(model, *inputs):
    model.train()
    model(*inputs)
    merge_ranges(model)
    return model.eval()


def read(folder):
    """(nodes by name, arrays by name, types by name) of the file."""
    model = onnx.load(str(folder / "model.onnx"))
    tensors = model.graph.initializer
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in tensors}
    return {node.name: node for node in model.graph.node}, {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}, types


def verified(folder):
    return json.loads((folder / "manifest.json").read_text())["verification"]


# ---------------------------------------------------------------- what is exported exactly


def test_every_grid_of_weights_is_stored_in_the_fewest_bits(tmp_path):
    model, x = chain("weight", WEIGHTS), torch.randn(2, 5, 12)
    folder = export(model, tmp_path / "out", format="onnx", example_inputs=x)
    nodes, arrays, types = read(folder)
    for name, (spec, kind) in WEIGHTS.items():
        key, layer = f"layers.{name}", model.layers[name]
        assert types[f"{key}.codes"] == kind, name
        codes, scale = arrays[f"{key}.codes"].astype(np.float32), arrays[f"{key}.scale"]
        is_turned = spec.zero_point == "integer"  # [in, out], the factor of a product
        assert list(nodes[key].input[:2]) == [f"{key}.codes", f"{key}.scale"]
        zero = arrays.get(f"{key}.zero_point", np.float32(0)).astype(np.float32)
        if is_turned:
            codes, scale, zero = codes.T, scale.T, zero.T
        if scale.ndim == 2:
            scale, zero = scale.repeat(4, 1), zero.repeat(4, 1) if zero.ndim else zero
        elif scale.ndim == 1:
            scale, zero = scale[:, None], zero[:, None] if zero.ndim else zero
        expected = layer.quantized_weight().detach()
        if spec.zero_point == "integer":
            assert np.array_equal((codes - zero) * scale, expected.numpy()), name
        else:
            low = expected - torch.from_numpy(codes * scale)
            assert low.unflatten(1, (-1, 4) if spec.group_size else (1, -1)).std(-1).max() < 1e-6  # what is left is one value per block
    found = verified(folder)
    assert (found["weights"], found["codes_different"], found["scales_different"]) == (len(WEIGHTS), 0, 0)
    assert found["max_logit_difference"] < 1e-5
    assert onnx.load(str(folder / "model.onnx")).opset_import[0].version == 25  # int2


@pytest.mark.parametrize("inputs", [INPUTS, pytest.param(TRACED, marks=pytest.mark.slow)], ids=["written", "traced"])
def test_every_grid_of_inputs_is_computed_bit_for_bit(inputs, tmp_path):
    model, x = chain("input", inputs), torch.randn(2, 5, 12)
    with torch.no_grad():
        x[0, 0] = 0  # a token without a range
    folder = export(model, tmp_path / "out", format="onnx", example_inputs=x)
    found, (nodes, _, types) = verified(folder), read(folder)
    assert (found["activations"], found["activations_different"]) == (len(inputs), 0)
    assert found["largest_relative_difference_between_activations"] < 1e-5
    quantize = [node for node in nodes.values() if node.op_type == "QuantizeLinear"]
    assert len(quantize) == sum(is_linear for _, is_linear in inputs.values())
    assert all(types[node.input[2]] == "UINT8" for node in quantize)
    assert onnx.load(str(folder / "model.onnx")).opset_import[0].version == 21
    loaded = load_quantized(folder)
    other = torch.randn(7, 1, 12)[:, :1].expand(7, 5, 12).contiguous()  # another batch
    assert (loaded(other) - model(other)).abs().max() < 0.05  # not bitwise: roundings may fall on the other side between layers


def test_a_trained_network_of_ones_own(tmp_path):
    """An example_input_array is enough; the module is as before, the file names no machine, and onnxruntime needs nothing of ours."""

    class Mine(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = cnn()
            self.example_input_array = torch.randn(1, 3, 8, 8)

        def forward(self, pictures):
            return self.network(pictures / 2)

    module = Mine()
    insert_quantizers(module, "onnx-w8a8")
    images = torch.randn(4, 3, 8, 8)
    see_a_batch(module, images).train()
    before, modules = copy.deepcopy(module.state_dict()), list(module.named_modules())
    module.network.depthwise.eval()  # one part of it
    modes, buffers = [item.training for item in module.modules()], copy.deepcopy(dict(module.named_buffers()))
    folder = export(module, tmp_path / "out", format="onnx")
    assert [(name, id(item)) for name, item in module.named_modules()] == [(name, id(item)) for name, item in modules]
    assert [item.training for item in module.modules()] == modes
    assert all(torch.equal(value, buffers[name]) for name, value in module.named_buffers())  # ranges that batches widen
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all("quantized_weight" not in vars(item) for item in module.modules())

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"] == {"pictures": ["batch", "3", "8", "8"]}
    assert str(tmp_path.parent).encode() not in (folder / "model.onnx").read_bytes()
    assert __file__.encode() not in (folder / "model.onnx").read_bytes()
    metadata = {entry.key: entry.value for entry in onnx.load(str(folder / "model.onnx")).metadata_props}
    assert json.loads(metadata["lightning_qat.exact_onnxruntime"]) == manifest["onnxruntime"]

    settings, options = manifest["onnxruntime"], onnxruntime.SessionOptions()
    for key, value in settings["session_config"].items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, disabled_optimizers=settings["disabled_optimizers"])
    theirs = session.run(None, {"pictures": images.numpy()})[0]
    ours = load_quantized(folder)(images)
    assert np.array_equal(theirs, ours.numpy())
    assert (ours - module.eval()(images)).abs().max() < 1e-5
