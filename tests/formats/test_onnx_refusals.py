"""The ONNX format: a changed file is noticed, large weights lie beside the graph, and what cannot be expressed is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from models import cnn, mixtral, mlp
from torch import nn

from lightning_qat import KVSpec, QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.formats.base import Job
from lightning_qat.formats.exactness.fitting import Fit
from lightning_qat.formats.onnx import OnnxFormat, graph
from lightning_qat.formats.onnx.session import OnnxModel
from lightning_qat.quantizers.running_range import merge_ranges

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

STATIC = {"bits": 8, "granularity": "tensor", "dynamic": False}


# ---------------------------------------------------------------- a wrong file is never left behind


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = cnn()
    scheme = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(**STATIC))
    insert_quantizers(model, scheme)
    images = torch.randn(3, 3, 8, 8)
    model.train()
    model(images)
    merge_ranges(model.eval())
    job = Job(model=model, scheme=scheme, fit=Fit(inputs={}, kv={}, scale_dtypes={}), example={"images": images})
    folder = tmp_path_factory.mktemp("written")
    OnnxFormat().write(job, folder)
    return job, folder


def flip_a_code(model, tensors, nodes):
    tensor = tensors["stem.codes"]
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def change_a_scale(model, tensors, nodes):
    array = onnx.numpy_helper.to_array(tensors["depthwise.scale"]).copy()
    array[0] = np.nextafter(array[0], np.float32(1))
    tensors["depthwise.scale"].CopyFrom(onnx.numpy_helper.from_array(array, "depthwise.scale"))


def change_a_bias(model, tensors, nodes):
    array = onnx.numpy_helper.to_array(tensors["stem.bias"]) + np.float32(0.01)
    tensors["stem.bias"].CopyFrom(onnx.numpy_helper.from_array(array, "stem.bias"))


def do_not_clip(model, tensors, nodes):
    """An int8 code of -128, which the narrow range does not have."""
    clip = next(node for node in nodes if node.op_type == "Clip")
    clip.op_type, clip.input[:] = "Identity", clip.input[:1]
    del clip.input[1:]


def change_an_activation_scale(model, tensors, nodes):
    name = next(node for node in nodes if node.op_type == "QuantizeLinear").input[1]
    array = np.float32(onnx.numpy_helper.to_array(tensors[name]) * 1.01)
    tensors[name].CopyFrom(onnx.numpy_helper.from_array(np.array(array), name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_code, "stem: 1 of 216 codes read back differently"),
        (change_a_scale, "depthwise: 1 of 8 scales read back differently"),
        (change_a_bias, "onnxruntime computes something else"),
        (change_an_activation_scale, "values that onnxruntime makes of the same input differ"),
        (do_not_clip, "values that onnxruntime makes of the same input differ"),
    ],
)
def test_a_changed_file_is_noticed(written, damage, message, tmp_path):
    job, folder = written
    OnnxFormat().verify(job, folder, {})
    shutil.copytree(folder, tmp_path / "out")
    model = onnx.load(str(tmp_path / "out" / "model.onnx"))
    damage(model, {tensor.name: tensor for tensor in model.graph.initializer}, model.graph.node)
    onnx.save(model, str(tmp_path / "out" / "model.onnx"))
    if damage is do_not_clip:  # an input far below the range shows it
        job = Job(model=job.model, scheme=job.scheme, fit=job.fit, example={"images": job.example["images"] - 9})
    with pytest.raises(RuntimeError, match=message):
        OnnxFormat().verify(job, tmp_path / "out", {})
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model.onnx"}


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "SINGLE_FILE_BYTES", 0)
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(3, 64)
    insert_quantizers(model, "w4")
    folder = export(model, tmp_path / "out", format="onnx", example_inputs=x)
    assert (folder / "model.onnx.data").stat().st_size >= 64 * 64 // 2
    assert sorted(json.loads((folder / "manifest.json").read_text())["sha256"]) == ["model.onnx", "model.onnx.data"]
    assert (load_quantized(folder)(x) - model(x)).abs().max() < 1e-5


# ---------------------------------------------------------------- what is refused


def scheme_of_inputs(**fields):
    return QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(**{"bits": 8, "granularity": "token"} | fields))


REFUSED = {
    "no example": (mlp, "w4a8", None, "example_inputs: the graph is traced, and nothing is known to run Sequential with"),
    "no tensor": (mlp, "w4a8", {"input": 3}, "example_inputs: the graph is traced"),
    "bf16": (lambda: mlp().bfloat16(), "w4", torch.randn(2, 16), r"parameters are bfloat16, .* export model.float\(\)"),
    "fp16": (lambda: mlp().half(), "w4a8", torch.randn(2, 16), "parameters are float16"),
    "fp64": (lambda: mlp().double(), "w16a8", torch.randn(2, 16), "parameters are float64"),
    "columns": (mlp, QuantScheme(weight=TensorSpec(bits=4, axis=1)), torch.randn(2, 16), "weight.axis: got 1, executed is None or 0"),
    "percentile": (mlp, scheme_of_inputs(range_finder="percentile"), torch.randn(2, 16), "input.range_finder: got 'percentile'"),
    "mean": (mlp, scheme_of_inputs(bits=2, quantizer="mean_abs"), torch.randn(2, 16), "input.quantizer: got 'mean_abs'"),
    "experts": (mixtral, "w4", None, "mlp.experts: which experts run depends on the input"),
    "unseen": (mlp, "onnx-w8a8", torch.randn(2, 16), "0.input_quantizer: its static range has not seen a batch"),
}


@pytest.mark.filterwarnings("ignore:export. no tokenizer")
@pytest.mark.parametrize(("build", "scheme", "example", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_why(build, scheme, example, message, tmp_path):
    model = build()
    insert_quantizers(model, scheme, allow_partial=True)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", format="onnx", example_inputs=example)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_cannot_be_traced_is_refused_and_leaves_nothing(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, flag=True):
            return self.layer(x) if flag or x.sum() > 0 else x

    model = Branch()
    insert_quantizers(model, "w8")
    x = torch.randn(2, 16)
    with pytest.raises(ValueError, match="unused: the forward pass does not use it for this example"):
        export(model, tmp_path / "out", format="onnx", example_inputs=x)
    with pytest.raises(ValueError, match=r"torch\.onnx cannot trace Branch, in a graph that fits every batch"):
        export(model, tmp_path / "out", format="onnx", example_inputs={"x": x, "flag": False})
    assert list(tmp_path.iterdir()) == []
    assert "forward" not in vars(model.layer)


def test_a_scheme_is_fitted_to_onnx():
    written = QuantScheme(weight=TensorSpec(bits=3), input=TensorSpec(bits=8, granularity="token", arithmetic="input"), kv=KVSpec(bits=4))
    fitted = QuantScheme.parse(written, target="onnx")
    assert (fitted.input.arithmetic, fitted.weight, fitted.kv) == ("float32", written.weight, written.kv)
    assert QuantScheme.parse("onnx-w8a8", target="onnx") == QuantScheme.parse("onnx-w8a8")


def test_a_loaded_model_says_what_it_takes(written):
    job, folder = written
    model, images = OnnxModel(folder / "model.onnx"), job.example["images"]
    assert torch.equal(model(images), model(images=images))
    assert not model.training
    with pytest.raises(ValueError, match="pixels: the graph has no such input; it takes images"):
        model(pixels=images)
    with pytest.raises(ValueError, match="images: no tensor was given"):
        model()
    with pytest.raises(ValueError, match="model: an ONNX file holds its graph"):
        OnnxFormat().load(folder, {}, mlp())
