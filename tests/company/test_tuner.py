"""BatchSizeFinder and LearningRateFinder run loops inside a run; what they leave is what they found."""

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from regression import INPUTS, Regression, loader, quantized_layers, same_state, trainer
from torch.utils.data import DataLoader

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, insert_quantizers, named_quantizers

STATIC = QuantScheme(weight=TensorSpec(bits=4), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))


class LongRegression(Regression):
    """Enough batches for a search."""

    def train_dataloader(self):
        return DataLoader(INPUTS.repeat(8, 1), batch_size=self.batch_size)

    def val_dataloader(self):
        return loader()


class Start(Callback):
    """The state in which the first batch of the real run finds the module."""

    def on_train_start(self, trainer, pl_module):
        self.state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def untouched(scheme):
    module = LongRegression()
    insert_quantizers(module, scheme)
    return module


def check_left_alone(module, scheme):
    assert same_state(module.state_dict(), untouched(scheme).state_dict())
    assert quantized_layers(module) == ["net.0", "net.2"]
    assert len(list(named_quantizers(module))) == 4
    assert not module.net[2]._forward_pre_hooks
    assert all(layer.keeps == "nothing" for layer in (module.net[0], module.net[2]))


@pytest.mark.parametrize(
    ("finder", "scheme", "order"),
    [
        pytest.param("lr", "w4a8", 1, id="lr, ours first"),
        pytest.param("lr", STATIC, -1, id="lr, theirs first, running range"),
        pytest.param("batch size", STATIC, 1, id="batch size, ours first, running range"),
        pytest.param("batch size", "w4a8", -1, id="batch size, theirs first", marks=pytest.mark.slow),
    ],
)
def test_a_finder_in_the_callbacks_leaves_the_start_of_the_run_alone(finder, order, scheme, tmp_path):
    start, module = Start(), LongRegression()
    find = LearningRateFinder(num_training_steps=20) if finder == "lr" else BatchSizeFinder(max_trials=3, steps_per_trial=1)
    run = trainer(*[QuantizationCallback(scheme), find][::order], start, epochs=1, default_root_dir=tmp_path)
    run.fit(module)
    assert same_state(start.state, untouched(scheme).state_dict())
    assert (module.lr, module.batch_size) != (1e-2, 4)
    assert not same_state(module.state_dict(), untouched(scheme).state_dict())
    assert quantized_layers(module) == ["net.0", "net.2"]
    assert list(tmp_path.rglob("*.ckpt")) == []


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("lr_find", "w4a8"), ("lr_find", STATIC), ("scale_batch_size", STATIC)],
    ids=["lr", "lr, running range", "batch size"],
)
def test_the_tuner_leaves_module_and_random_numbers_as_they_were(method, scheme, tmp_path):
    module, kinds = LongRegression(), set()
    module.net[0].register_forward_pre_hook(lambda layer, args: kinds.add(type(layer).__name__))
    run = trainer(QuantizationCallback(scheme), epochs=1, default_root_dir=tmp_path)
    random = torch.get_rng_state()
    options = {"num_training": 20} if method == "lr_find" else {"max_trials": 3, "steps_per_trial": 1}
    getattr(Tuner(run), method)(module, **options)
    assert kinds == {"QuantLinear"}  # what was measured is the quantized network
    check_left_alone(module, scheme)
    assert torch.equal(torch.get_rng_state(), random)
    run.fit(module)
    twin = LongRegression(lr=module.lr, batch_size=module.batch_size)
    trainer(QuantizationCallback(scheme), epochs=1).fit(twin)
    assert same_state(module.state_dict(), twin.state_dict())
