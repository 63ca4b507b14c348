"""What the callback does around the quantizers: kept weights, running ranges, products on integer codes."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from test_quantization_callback import BATCHES, Regression, loader, trainer
from torch.utils.data import DataLoader

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, named_quantizers
from lightning_qat.modules import QuantLayer

STATIC = QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))


def run(module, accumulate, *, scheme="w4a8", single=False, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    fit = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        callbacks=[QuantizationCallback(scheme, **kwargs)],
        **quiet,
    )
    fit.fit(module, DataLoader(BATCHES, batch_size=2), DataLoader(BATCHES, batch_size=4))
    return module


def module():
    torch.manual_seed(0)
    return Regression()


def test_accumulated_micro_batches_quantize_each_weight_once_a_step(monkeypatch):
    calls = []
    compute = QuantLayer._compute_weight
    monkeypatch.setattr(QuantLayer, "_compute_weight", lambda self, dtype: calls.append(self.training) or compute(self, dtype))
    trained = run(module(), accumulate=4)
    layers = sum(isinstance(layer, QuantLayer) for layer in trained.modules())
    assert calls.count(True) == 3 * layers  # three steps of four micro-batches
    assert calls.count(False) == 3 * layers  # three validation loops of two batches


def test_kept_weights_change_no_bit_of_the_result(monkeypatch):
    ours = run(module(), accumulate=2).state_dict()
    monkeypatch.setattr("lightning_qat.callbacks.quantization.WeightReuse.start", lambda *args, **kwargs: None)
    plain = run(module(), accumulate=2).state_dict()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_nothing_is_kept_after_the_run_or_an_exception():
    class Failing(Regression):
        def on_train_epoch_end(self):
            raise RuntimeError("stop")

    broken = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        run(broken, accumulate=2)
    for finished in (broken, run(module(), accumulate=2)):
        assert {layer.keeps for layer in finished.modules() if isinstance(layer, QuantLayer)} == {"nothing"}


def test_static_ranges_follow_training_and_are_saved(tmp_path):
    static = run(module(), accumulate=1, scheme=STATIC)
    ranges = {name: q.running for name, q in named_quantizers(static) if q.running is not None}
    assert ranges
    assert all(r.batches.item() == 12 and r.low < r.high for r in ranges.values())
    assert any(name.endswith("running.low") for name in static.state_dict())
    first = static.net[0].input_quantizer.running
    assert first.low >= BATCHES.min() - 1e-6
    assert first.high <= BATCHES.max() + 1e-6


def test_int8_forward_is_a_flag_of_the_callback(monkeypatch):
    monkeypatch.setattr("lightning_qat.modules.int8.is_faster", lambda x, weight: True)
    ours, plain = run(module(), 1, scheme="w8a8", int8_forward=True), run(module(), 1, scheme="w8a8")
    assert all(layer.int8_forward for layer in ours.modules() if isinstance(layer, QuantLayer))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-2)


def test_int8_forward_without_any_layer_that_can_is_refused():
    with pytest.raises(MisconfigurationException, match=r"int8_forward: no layer.*have to be fake-quantized both.*'w8a8'"):
        trainer(QuantizationCallback("w8", int8_forward=True)).fit(Regression(), loader())
