"""Beside ModelPruning (PL#11047): the masked weight is what is quantized, and zeros stay zeros down to the exported codes."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from regression import INPUTS, Regression, loader, quantized_layers, same_state, trainer
from torch.nn.utils import prune

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, export, insert_quantizers, load_quantized
from lightning_qat.modules.weights import layer_weights


def pruning(**kwargs):
    return ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"], **kwargs)


def sparsity(weight):
    return (weight == 0).float().mean().item()


class Watcher(Callback):
    """Of every step: how sparse masks and codes were, and whether a pruned place had a code."""

    def __init__(self):
        self.sparsities, self.leaks, self.masked_gradients = [], 0, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for weight in layer_weights(pl_module):
            mask = getattr(weight.layer, "weight_mask", None)
            if mask is not None:
                codes = weight.codes().codes
                self.sparsities.append(sparsity(mask))
                self.leaks += int((codes[mask == 0] != 0).sum())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for layer in (pl_module.net[0], pl_module.net[2]):
            if hasattr(layer, "weight_mask"):
                self.masked_gradients += int((layer.weight_orig.grad[layer.weight_mask == 0] != 0).sum())


@pytest.mark.parametrize("order", [0, 1], ids=["ours first", "theirs first"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pruned_weights_are_zero_codes_while_training_and_after(order, accumulate, tmp_path):
    watcher, module = Watcher(), Regression()
    callbacks = [QuantizationCallback("w4a8"), pruning()]
    run = trainer(*callbacks[:: -1 if order else 1], watcher, epochs=3, accumulate_grad_batches=accumulate)
    run.fit(module, loader(2), loader())
    assert len(watcher.sparsities) > 0
    assert max(watcher.sparsities) > 0.5
    assert watcher.leaks == watcher.masked_gradients == 0
    assert quantized_layers(module) == ["net.0", "net.2"]
    pruned = module.net[0].weight == 0
    assert pruned.float().mean() > 0.5
    loaded = load_quantized(export(module, tmp_path / "out"), model=Regression())
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS), module(INPUTS))
        assert (loaded.net[0].quantized_weight()[pruned] == 0).all()


def test_the_masked_weight_is_what_the_layer_multiplies_with():
    module, plain = Regression(), Regression()
    insert_quantizers(module, "w4a8")
    prune.l1_unstructured(module.net[0], "weight", amount=0.5)
    with torch.no_grad():
        plain.net[0].weight.mul_(module.net[0].weight_mask)
    insert_quantizers(plain, "w4a8")
    assert torch.equal(module(INPUTS), plain(INPUTS))
    module(INPUTS).square().mean().backward()
    plain(INPUTS).square().mean().backward()
    assert torch.equal(module.net[0].weight_orig.grad, plain.net[0].weight.grad * module.net[0].weight_mask)


def test_kept_weights_change_no_bit_of_a_pruned_run(monkeypatch):
    def result():
        module = Regression()
        trainer(QuantizationCallback("w4a8"), pruning(), epochs=3, accumulate_grad_batches=2).fit(module, loader(2), loader())
        return module.state_dict()

    ours = result()
    monkeypatch.setattr("lightning_qat.callbacks.quantization.WeightReuse.start", lambda *args, **kwargs: None)
    assert same_state(ours, result())


def test_a_pruned_checkpoint_has_plain_names_and_is_read_by_others(tmp_path):
    module = Regression()
    run = trainer(QuantizationCallback("w4a8"), pruning())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "pruned.ckpt")
    saved = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == Regression().state_dict().keys()
    predicted = torch.cat(trainer(QuantizationCallback("w4a8")).predict(Regression(), loader(), ckpt_path=tmp_path / "pruned.ckpt"))
    with torch.no_grad():
        assert torch.equal(predicted, module(INPUTS))


def test_masks_that_are_still_on_have_to_be_made_permanent_before_export(tmp_path):
    module = Regression()
    trainer(QuantizationCallback("w4a8"), pruning(make_pruning_permanent=False)).fit(module, loader())
    with pytest.raises(ValueError, match=r"net\.0\.weight is under a pruning mask.*prune\.remove"):
        export(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for layer in (module.net[0], module.net[2]):
        prune.remove(layer, "weight")
    loaded = load_quantized(export(module, tmp_path / "out"), model=Regression())
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS), module(INPUTS))


def test_a_grid_of_whole_zero_points_keeps_zeros_too():
    scheme = QuantScheme(weight=TensorSpec(bits=4, symmetric=False))
    module = Regression()
    insert_quantizers(module, scheme)
    prune.l1_unstructured(module.net[0], "weight", amount=0.5)
    assert (module.net[0].quantized_weight()[module.net[0].weight_mask == 0] == 0).all()
