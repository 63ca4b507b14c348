"""What each adapter knows, without the machines that FSDP and DeepSpeed need."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from distil import LEARNED
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import llama
from torch import nn

from lightning_qat import insert_quantizers
from lightning_qat.callbacks.strategies import StrategyAdapter, adapter_of
from lightning_qat.callbacks.strategies.deepspeed import DeepSpeedAdapter
from lightning_qat.callbacks.strategies.fsdp import FSDPAdapter
from lightning_qat.callbacks.strategies.model_parallel import ModelParallelAdapter


def run(strategy, module=None, **settings):
    """What adapters ask of a trainer."""
    defaults = {"gradient_clip_val": None, "gradient_clip_algorithm": None, "world_size": 2, "optimizers": []}
    return SimpleNamespace(strategy=strategy, lightning_module=module or pl.LightningModule(), **defaults | settings)


@pytest.mark.parametrize(
    ("strategy", "adapter", "keeps"),
    [
        (SingleDeviceStrategy, StrategyAdapter, True),
        (DDPStrategy, StrategyAdapter, True),
        (FSDPStrategy, FSDPAdapter, False),
        (ModelParallelStrategy, ModelParallelAdapter, False),
        (DeepSpeedStrategy, DeepSpeedAdapter, False),
    ],
)
def test_every_strategy_has_its_adapter(strategy, adapter, keeps):
    found = adapter_of(object.__new__(strategy))  # DeepSpeed's constructor asks for its package
    assert type(found) is adapter
    assert found.keeps_weights is keeps


def test_optimizers_are_told_by_the_ids_of_parameters_but_not_under_deepspeed():
    layer = nn.Linear(2, 2)
    trainer = run(None, optimizers=[torch.optim.SGD([layer.weight], lr=0.1)])
    assert StrategyAdapter().optimized(trainer) == {id(layer.weight)}
    assert DeepSpeedAdapter().optimized(trainer) is None


def test_flat_parameters_are_refused_under_fsdp():
    FSDPAdapter().check(run(FSDPStrategy()), llama())
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy\(use_orig_params=False\).*leave it out"):
        FSDPAdapter().check(run(FSDPStrategy(use_orig_params=False)), llama())


class Clips(pl.LightningModule):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.trainer.model.clip_grad_norm_(gradient_clip_val)


def test_clipping_by_norm_is_refused_under_fsdp_unless_the_module_does_it():
    for algorithm in (None, "norm"):
        with pytest.raises(MisconfigurationException, match=r"(?s)gradient_clip_val: FSDP cannot .*def configure_gradient_clipping"):
            FSDPAdapter().check(run(FSDPStrategy(), gradient_clip_val=1.0, gradient_clip_algorithm=algorithm), llama())
    FSDPAdapter().check(run(FSDPStrategy(), gradient_clip_val=1.0, gradient_clip_algorithm="value"), llama())
    FSDPAdapter().check(run(FSDPStrategy(), Clips(), gradient_clip_val=1.0), llama())


def test_learned_parameters_that_are_not_sharded_are_refused_under_fsdp2():
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    model = llama()
    ModelParallelAdapter().check(run(strategy), model)
    insert_quantizers(model, LEARNED)
    with pytest.raises(MisconfigurationException, match=r"14 parameters of quantizers are not sharded .*apply fully_shard"):
        ModelParallelAdapter().check(run(strategy), model)
    ModelParallelAdapter().check(run(strategy, world_size=1), model)
