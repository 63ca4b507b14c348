"""Averaged weights (PL's WeightAveraging, EMA): they are what validation quantizes, and nothing that was kept is stale."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regression import INPUTS, Regression, loader, quantized_layers, same_state, trainer

from lightning_qat import QuantizationCallback, insert_quantizers
from lightning_qat.modules import QuantLayer

DECAY = 0.5


def average():
    return EMAWeightAveraging(decay=DECAY)


def run_of(*callbacks, epochs=3, **kwargs):
    return trainer(QuantizationCallback("w4a8"), average(), *callbacks, epochs=epochs, **kwargs)


class Watcher(Callback):
    """The weights after every optimizer step, and what validation measured."""

    def __init__(self):
        self.weights, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: tensor.detach().clone() for name, tensor in pl_module.named_parameters()})

    def on_validation_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["loss"].item())


def loss_of(weights):
    """The validation loss of a fresh quantized module with these weights."""
    module = Regression()
    insert_quantizers(module, "w4a8")
    module.load_state_dict(weights)
    with torch.no_grad():
        return torch.stack([(module(batch) * 2).square().mean() for batch in loader()]).mean().item()


def test_validation_quantizes_the_average():
    watcher, module = Watcher(), Regression()
    run_of(watcher).fit(module, loader(), loader())
    ema, expected = None, []
    for step, weights in enumerate(watcher.weights):
        ema = weights if ema is None else {name: DECAY * ema[name] + (1 - DECAY) * new for name, new in weights.items()}
        if step % 2 == 1:
            expected.append(loss_of(ema))
    assert watcher.losses == pytest.approx(expected, rel=1e-5)
    assert len(set(watcher.losses)) == 3
    assert all(
        torch.allclose(tensor, ema[name], atol=1e-7) for name, tensor in module.state_dict().items()
    )  # the end of training copies it


@pytest.mark.parametrize("accumulate", [1, 2])
def test_kept_weights_are_never_those_of_the_other_model(accumulate, monkeypatch):
    def result():
        watcher, module = Watcher(), Regression()
        run_of(watcher, accumulate_grad_batches=accumulate).fit(module, loader(2), loader())
        return watcher.losses, module.state_dict()

    (losses, weights), _ = result(), monkeypatch.setattr("lightning_qat.callbacks.quantization.WeightReuse.start", lambda *a, **k: None)
    plain_losses, plain = result()
    assert losses == plain_losses
    assert same_state(weights, plain)


def test_a_resumed_run_has_both_models(tmp_path):
    whole, first, resumed = Regression(), Regression(), Regression()
    run_of(epochs=4).fit(whole, loader(), loader())
    keeper = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run_of(keeper, epochs=2, enable_checkpointing=True).fit(first, loader(), loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not same_state(saved["state_dict"], saved["current_model_state"])
    run_of(epochs=4).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert same_state(resumed.state_dict(), whole.state_dict())
    assert quantized_layers(resumed) == ["net.0", "net.2"]


def test_the_checkpoint_is_the_average_for_everybody_else(tmp_path):
    module = Regression()
    run = run_of(epochs=2)
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    predicted = torch.cat(trainer(QuantizationCallback("w4a8")).predict(Regression(), loader(), ckpt_path=tmp_path / "end.ckpt"))
    with torch.no_grad():
        assert torch.equal(predicted, module(INPUTS))


def test_the_wrong_order_is_refused_before_anything_is_quantized():
    module = Regression()
    with pytest.raises(MisconfigurationException, match=r"WeightAveraging copies the model.*list QuantizationCallback before it"):
        trainer(average(), QuantizationCallback("w4a8")).fit(module, loader())
    assert not any(isinstance(layer, QuantLayer) for layer in module.modules())
