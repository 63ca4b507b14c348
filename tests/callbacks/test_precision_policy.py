"""The dtype of everything that a quantized layer touches, by precision: the table of docs/precision.md."""

import re
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.strategies import ModelParallelStrategy
from models import mlp
from scheduled import LearnedQuantizer, Recording, trainer
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, named_quantizers
from lightning_qat.quantizers import build_quantizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "precision.md"
COLUMNS = ("stored", "weight seen", "range", "values", "product", "input seen")
TABLE = {
    row[0]: dict(zip(COLUMNS, row[1:], strict=True))
    for row in (re.findall(r"[^|]+", line) for line in DOCUMENT.read_text("utf-8").replace(" ", "").splitlines() if "|float32|" in line)
}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


class Watched(Recording):
    """Writes down the dtypes around its second layer, whose weight has a learned gain and whose input a running range."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.ranges = {}, set()

    def on_train_start(self):
        layer = self.net[2]
        weight, input = layer.weight_quantizer, layer.input_quantizer
        weight.register_forward_hook(lambda module, args, out: self.dtypes.update({"weight seen": args[0].dtype, "values": out.dtype}))
        input.register_forward_hook(lambda module, args, out: self.dtypes.update({"input seen": args[0].dtype, "input values": out.dtype}))
        layer.register_forward_hook(lambda module, args, out: self.dtypes.update({"product": out.dtype}))
        for quantizer in (weight, input):
            original = quantizer.scale_and_zero_point
            quantizer.scale_and_zero_point = lambda rows, original=original: self.note(original(rows))

    def note(self, scale):
        self.ranges |= {tensor.dtype for tensor in scale if tensor is not None}
        return scale

    def on_train_end(self):
        layer = self.net[2]
        self.dtypes["stored"] = layer.weight.dtype
        self.ranges |= {b.dtype for b in layer.input_quantizer.running.buffers()} | {layer.weight_quantizer.gain.dtype}
        for module in (layer.weight_quantizer, layer.input_quantizer):
            del module.scale_and_zero_point

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Sharded(Watched):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        self.net = mlp().train()
        self.after_build()
        mesh = self.device_mesh["data_parallel"]
        for _, quantizer in list(named_quantizers(self.net)):
            if quantizer.learns:
                fully_shard(quantizer, mesh=mesh)
        fully_shard(self.net, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def scheme():
    return QuantScheme(
        weight=TensorSpec(bits=4, quantizer="learned-in-schedules"),
        input=TensorSpec(bits=8, granularity="tensor", dynamic=False, symmetric=False),
    )


def observed(module, **settings):
    trainer(QuantizationCallback(scheme()), steps=2, **settings).fit(module, DataLoader(torch.randn(8, 16), batch_size=4))
    assert len(module.ranges) == 1
    assert module.dtypes.pop("input values") == module.dtypes["product"]
    return {key: name_of(dtype) for key, dtype in module.dtypes.items()} | {"range": name_of(*module.ranges)}


def test_the_table_has_every_precision():
    assert list(TABLE) == ["`32-true`", "`bf16-mixed`", "`16-mixed`(GPU)", "`bf16-true`", "`16-true`", "FSDP2,`param_dtype`bfloat16"]


@pytest.mark.usefixtures("learned_scheme")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true"])
def test_the_table_is_what_happens(precision):
    assert observed(Watched(), precision=precision) == TABLE[f"`{precision}`"]


@pytest.mark.gpu
@pytest.mark.usefixtures("learned_scheme")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_float16_autocast():
    assert observed(Watched(), precision="16-mixed", accelerator="gpu") == TABLE["`16-mixed`(GPU)"]


def observed_sharded():
    return observed(Sharded(), strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), devices=2)


@pytest.mark.usefixtures("learned_scheme")
def test_sharded_weights_are_quantized_in_the_dtype_they_are_gathered_in():
    for rank in run_ranks(observed_sharded):
        assert rank == TABLE["FSDP2,`param_dtype`bfloat16"]


# ---------------------------------------------------------------- what quantizers hold is never cast


@pytest.mark.usefixtures("learned_scheme")
@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double], ids=["bf16", "fp16", "fp64"])
def test_learned_parameters_and_ranges_are_not_cast(cast):
    weight, input = build_quantizer(scheme().weight), build_quantizer(scheme().input)
    with torch.no_grad():
        weight.gain.fill_(1.0 + 2.0**-20)
    parameter = weight.gain
    cast(torch.nn.ModuleList([weight, input]))
    assert weight.gain is parameter
    assert {t.dtype for t in (*weight.parameters(), *input.buffers())} == {torch.float32}
    assert weight.gain.item() == 1.0 + 2.0**-20


@pytest.mark.usefixtures("learned_scheme")
def test_they_move_between_devices():
    weight: LearnedQuantizer = build_quantizer(scheme().weight)
    weight.to(device="meta", dtype=torch.bfloat16)
    assert (weight.gain.is_meta, weight.gain.dtype) == (True, torch.float32)
    weight.bfloat16().to_empty(device="cpu")
    assert (weight.gain.is_meta, weight.gain.dtype) == (False, torch.float32)


@pytest.mark.usefixtures("learned_scheme")
def test_they_are_born_in_float32_where_new_tensors_are_not():
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizers = [build_quantizer(scheme().weight), build_quantizer(scheme().input)]
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for q in quantizers for t in (*q.parameters(), *q.buffers())} == {torch.float32}
