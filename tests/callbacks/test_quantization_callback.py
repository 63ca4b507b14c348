"""The callback on any LightningModule: quantizers are in before weights load and optimizers are built; nothing else is left behind."""

import copy
import inspect
import json
import pickle
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from learned import LearnedGain
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import mlp
from regression import Regression
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec, insert_quantizers, named_quantizers
from lightning_qat.modules import QuantLayer
from lightning_qat.quantizers import quantizers

BATCHES = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def loader():
    """Two batches, one epoch."""
    return DataLoader(BATCHES, batch_size=4)


def trainer(*callbacks, epochs=1):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), num_sanity_val_steps=0, **quiet)


def fitted(scheme="w4a8", epochs=1, module=None, **kwargs):
    run = trainer(QuantizationCallback(scheme), epochs=epochs)
    run.fit(module or Regression(), loader(), **kwargs)
    return run


def quantized_names(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, QuantLayer)]


def checkpoint_of(run, folder):
    path = folder / "last.ckpt"
    run.save_checkpoint(path)
    return path


# ---------------------------------------------------------------- the whole way


def test_fit_checkpoint_resume_validate_and_load(tmp_path):
    module = Regression()
    keys = list(module.state_dict())
    whole = fitted(epochs=2, module=module)
    assert quantized_names(module) == ["net.0", "net.2"]
    assert list(module.state_dict()) == keys
    assert not torch.equal(module.net[0].weight, mlp()[0].weight)

    path = checkpoint_of(fitted(epochs=1), tmp_path)
    resumed = fitted(epochs=2, ckpt_path=path)
    assert resumed.global_step == whole.global_step == 4
    for name, tensor in module.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], tensor), name

    path = checkpoint_of(whole, tmp_path)
    (scores,) = trainer(QuantizationCallback("w4a8")).validate(Regression(), loader(), ckpt_path=path, verbose=False)
    expected = torch.stack([(module(batch) * 2).square().mean() for batch in loader()]).mean()
    assert scores["loss"] == pytest.approx(expected.item(), rel=1e-6)

    loaded = Regression.load_from_checkpoint(path, weights_only=True)
    assert quantized_names(loaded) == []
    insert_quantizers(loaded, "w4a8")
    assert torch.equal(loaded(BATCHES), module(BATCHES))


def test_every_stage_finds_the_same_quantizers():
    module, callback = Regression(), QuantizationCallback("w4a8")
    run = trainer(callback)
    run.fit(module, loader())
    before, expected = dict(named_quantizers(module)), module(BATCHES).detach()
    assert [layer.name for layer in callback.report.layers] == ["net.0", "net.2"]
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    predictions = torch.cat(run.predict(module, loader()))
    assert torch.equal(predictions, expected)
    assert callback.report.inserted == 0
    assert dict(named_quantizers(module)) == before
    assert vars(module).keys().isdisjoint({"configure_model", "after_build"})


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_may_come_first(stage):
    module, fresh = Regression(), Regression()
    insert_quantizers(fresh, "w2a4")
    getattr(trainer(QuantizationCallback("w2a4")), stage)(module, loader())
    assert quantized_names(module) == ["net.0", "net.2"]
    assert torch.equal(module(BATCHES), fresh(BATCHES))


def test_fit_twice_goes_on_with_the_same_quantizers():
    module = Regression()
    fitted(module=module)
    before, weight = dict(named_quantizers(module)), module.net[0].weight.clone()
    fitted(module=module)
    assert dict(named_quantizers(module)) == before
    assert not torch.equal(module.net[0].weight, weight)


# ---------------------------------------------------------------- whose layers


class BuiltLate(Regression):
    """One layer from __init__, one born in setup, one in configure_model."""

    def __init__(self):
        super().__init__()
        self.born_in_setup = self.born_in_configure = None

    def setup(self, stage):
        self.born_in_setup = self.born_in_setup or nn.Linear(8, 8)

    def configure_model(self):
        self.born_in_configure = self.born_in_configure or nn.Linear(8, 8)

    def forward(self, x, gain=1.0):
        return self.born_in_configure(self.born_in_setup(self.net(x))) * gain


def test_layers_built_in_setup_and_configure_model_are_quantized_and_trained():
    module = BuiltLate()
    run = fitted(module=module)
    assert quantized_names(module) == ["net.0", "net.2", "born_in_setup", "born_in_configure"]
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


class Nested(Regression):
    """Teacher and head beside a student that lies `depth` levels below the module."""

    def __init__(self, depth):
        super().__init__()
        del self.net
        self.student = mlp()
        if depth == 2:
            self.body = nn.ModuleDict({"student": self.student})
            del self.student
        self.quantization_root = {1: "student", 2: "body.student"}[depth]
        self.teacher, self.head = mlp(), nn.Linear(8, 8)

    def forward(self, x, gain=1.0):
        return self.head(self.get_submodule(self.quantization_root)(x) - self.teacher(x)) * gain


@pytest.mark.parametrize(("depth", "names"), [(1, ["student.0", "student.2"]), (2, ["body.student.0", "body.student.2"])])
def test_only_what_lies_below_the_root_is_quantized(depth, names):
    module = Nested(depth)
    keys = list(module.state_dict())
    fitted(module=module)
    assert quantized_names(module) == names
    assert list(module.state_dict()) == keys


def test_a_root_that_is_no_submodule_is_refused():
    module = Nested(1)
    module.quantization_root = "pupil"
    with pytest.raises(AttributeError, match="pupil"):
        fitted(module=module)
    module.quantization_root = 3
    with pytest.raises(MisconfigurationException, match=r"quantization_root: got 3, expected the dotted name"):
        fitted(module=module)


# ---------------------------------------------------------------- beside other people's code


class AnotherCallback(QuantizationCallback):
    """Lightning takes one callback of a class; a subclass counts as another one."""


def test_two_callbacks_of_one_scheme_are_like_one():
    module = Regression()
    trainer(QuantizationCallback("w4a8"), AnotherCallback("w4a8")).fit(module, loader())
    assert quantized_names(module) == ["net.0", "net.2"]
    assert vars(module).keys().isdisjoint({"configure_model", "after_build"})
    pickle.dumps(module)


def test_two_callbacks_of_two_schemes_are_refused():
    module = Regression()
    with pytest.raises((ValueError, MisconfigurationException), match="already quantized"):
        trainer(QuantizationCallback("w4a8"), AnotherCallback("w8a8")).fit(module, loader())
    assert vars(module).keys().isdisjoint({"configure_model", "after_build"})


def test_a_hook_that_the_user_put_on_the_instance_runs_and_stays():
    module = Regression()
    calls = []
    module.configure_model = own = partial(calls.append, "called")
    fitted(module=module)
    assert calls == ["called"]
    assert quantized_names(module) == ["net.0", "net.2"]
    assert vars(module)["configure_model"] is own


class FailsInSetup(Regression):
    def setup(self, stage):
        raise RuntimeError("no data today")


class FailsInConfigure(Regression):
    def configure_model(self):
        raise RuntimeError("no data today")


@pytest.mark.parametrize("cls", [FailsInSetup, FailsInConfigure])
def test_a_failure_leaves_a_module_that_pickles(cls):
    module = cls()
    with pytest.raises(RuntimeError, match="no data today"):
        fitted(module=module)
    assert vars(module).keys().isdisjoint({"configure_model", "after_build"})
    assert torch.equal(pickle.loads(pickle.dumps(module))(BATCHES), module(BATCHES))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_trained_module_copies(copied):
    module = Regression()
    fitted(module=module)
    twin = copied(module)
    assert quantized_names(twin) == ["net.0", "net.2"]
    assert torch.equal(twin(BATCHES), module(BATCHES))


def test_forward_stays_as_it_was():
    module = Regression()
    signature = inspect.signature(module.forward)
    fitted(module=module)  # training_step passes gain by name
    assert "forward" not in vars(module)
    assert inspect.signature(module.forward) == signature
    assert torch.equal(module(BATCHES, gain=3.0), module(x=BATCHES) * 3.0)


def test_weight_averaging_has_to_come_later():
    average = WeightAveraging(avg_fn=get_ema_avg_fn(0.5))
    with pytest.raises(MisconfigurationException, match=r"list QuantizationCallback before it"):
        trainer(average, QuantizationCallback("w4a8")).fit(Regression(), loader())
    module = Regression()
    trainer(QuantizationCallback("w4a8"), WeightAveraging(avg_fn=get_ema_avg_fn(0.5))).fit(module, loader())
    assert quantized_names(module) == ["net.0", "net.2"]


# ---------------------------------------------------------------- sharding inside configure_model


class FSDPLinear(nn.Linear):
    """What fully_shard makes of a Linear layer, as far as insertion can see."""


class FSDPQuantLinear(FSDPLinear):
    """The same for a quantized one."""


class Sharding(Regression):
    """Builds and shards in configure_model; whether it calls after_build in between is up to the test."""

    def __init__(self, between):
        super().__init__()
        self.net, self.between, self.seen = None, between, None

    def configure_model(self):
        if self.net is not None:
            return
        self.net = nn.Sequential(nn.Linear(16, 8))
        if self.between:
            self.after_build()
        self.seen = quantized_names(self)
        if not self.seen:
            self.net[0].__class__ = FSDPLinear


def test_after_build_inserts_between_building_and_sharding():
    module = Sharding(between=True)
    fitted(module=module)
    assert module.seen == ["net.0"]
    assert not hasattr(module, "after_build")


def test_a_module_that_sharded_too_early_is_shown_the_fix():
    with pytest.raises(MisconfigurationException, match=r"(?s)net\.0 was sharded before.*of Sharding.*self\.after_build\(\)"):
        fitted(module=Sharding(between=False))


# ---------------------------------------------------------------- guards


@pytest.fixture
def learned():
    quantizers.add("learned-for-a-test", LearnedGain)
    yield QuantScheme(weight=TensorSpec(bits=4, quantizer="learned-for-a-test"))
    del quantizers._entries["learned-for-a-test"]


class EarlyOptimizer(Regression):
    """The optimizer is built in __init__, as LightningCLI's auto_configure_optimizers and some users do."""

    def __init__(self):
        super().__init__()
        self.early = torch.optim.AdamW(self.parameters(), lr=1e-2)

    def configure_optimizers(self):
        return self.early


def test_a_learned_scale_that_no_optimizer_holds_is_refused(learned):
    with pytest.raises(MisconfigurationException, match=r"'net\.0\.weight_quantizer'.*auto_configure_optimizers=False"):
        fitted(learned, module=EarlyOptimizer())


def test_a_learned_scale_is_trained_and_resumed(learned, tmp_path):
    module = Regression()
    run = fitted(learned, epochs=2, module=module)
    gain = module.net[0].weight_quantizer.gain
    assert gain.item() != 1.0
    resumed = fitted(learned, epochs=2, ckpt_path=checkpoint_of(fitted(learned, epochs=1), tmp_path))
    assert torch.equal(resumed.lightning_module.net[0].weight_quantizer.gain, gain)
    assert run.global_step == resumed.global_step


def test_parameters_that_the_user_holds_back_are_only_warned_about():
    class OnlyHead(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"2 parameters of the quantized model are held by no optimizer, the first is 'net\.0\.weight'"):
        fitted(module=OnlyHead())


class Bypass(Regression):
    def forward(self, x, gain=1.0):
        hidden = functional.linear(x, self.net[0].weight, self.net[0].bias).relu()
        return self.net[2](hidden) * gain


def test_a_layer_that_the_model_bypasses_is_found_by_the_first_batch():
    module = Bypass()
    with pytest.raises(MisconfigurationException, match=r"1 quantized layers were not called.*\['net\.0'\]"):
        fitted(module=module)
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    fitted(QuantScheme(weight=TensorSpec(bits=4), exclude=("net.0",)), module=Bypass())


# ---------------------------------------------------------------- the checkpoint


def test_the_state_is_plain_data(tmp_path):
    path = checkpoint_of(fitted("w4g16a8"), tmp_path)
    (state,) = torch.load(path, weights_only=True)["callbacks"].values()
    assert json.loads(json.dumps(state)) == state
    assert QuantScheme.parse(state["scheme"]) == QuantScheme.parse("w4g16a8")


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ("w8a8", r"scheme\.weight\.bits: 4 in the checkpoint, 8 here"),
        ("w4g16a8", r"scheme\.weight\.group_size: None in the checkpoint, 16 here"),
        ("w4", r"scheme\.input: \{.*'bits': 8.*\} in the checkpoint, None here"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_checkpoint_of_another_scheme_is_refused_with_the_difference(other, line, stage, tmp_path):
    path = checkpoint_of(fitted("w4a8"), tmp_path)
    with pytest.raises(MisconfigurationException, match=line):
        getattr(trainer(QuantizationCallback(other), epochs=2), stage)(Regression(), loader(), ckpt_path=path)


def test_an_unknown_scheme_is_refused_at_once():
    with pytest.raises(ValueError, match="scheme: got 'w4b8'"):
        QuantizationCallback("w4b8")
