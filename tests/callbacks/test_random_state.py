"""States of random number generators in checkpoints: plain, of every rank, and nothing moves while they are saved."""

import os
import random
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy
import pytest
import torch
from gloo import run_ranks
from lightning.pytorch.trainer.states import TrainerFn
from models import mlp
from torch import distributed
from torch.utils.data import DataLoader

from lightning_qat import QuantizationCallback, QuantScheme, TensorSpec
from lightning_qat.callbacks.random_state import CHECKPOINT_KEY, RandomState
from lightning_qat.quantizers.running_range import RunningRange


def trainer(world=1, rank=0):
    loop = SimpleNamespace(
        restarting=False,
        _combined_loader_states_to_load=[],
        _data_fetcher=None,
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=False)),
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(strategy=strategy, world_size=world, global_rank=rank, fit_loop=loop)


def draw():
    numpy.random.standard_normal()  # leaves the other half of a pair behind
    return torch.rand(2).tolist(), numpy.random.standard_normal(3).tolist(), random.gauss(0, 1), random.random()


def saved():
    checkpoint = {}
    RandomState().save(trainer(), checkpoint)
    return checkpoint


def test_what_was_saved_is_drawn_again(tmp_path):
    random.gauss(0, 1)  # as above, for Python
    numpy.random.standard_normal()
    torch.save(saved(), tmp_path / "checkpoint")
    first = draw()
    assert draw() != first
    state = RandomState()
    state.load(trainer(), torch.load(tmp_path / "checkpoint", weights_only=True))
    draw()
    state.restore(trainer())
    assert draw() == first
    state.restore(trainer())  # once only
    assert draw() != first


def test_saving_draws_nothing():
    state = saved()
    first = draw()
    restored = RandomState()
    restored.load(trainer(), state)
    restored.restore(trainer())
    saved()
    assert draw() == first


def test_what_was_loaded_can_be_forgotten():
    state, checkpoint = RandomState(), saved()
    state.load(trainer(), checkpoint)
    state.forget()
    draw()
    expected = saved()[CHECKPOINT_KEY]["ranks"][0]["torch"]
    state.restore(trainer())
    assert torch.equal(torch.get_rng_state(), expected)


def ranks_job():
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    torch.manual_seed(rank)
    checkpoint = {}
    RandomState().save(trainer(2, rank), checkpoint)
    mine = torch.rand(3)
    torch.manual_seed(77)
    state = RandomState()
    state.load(trainer(2, rank), checkpoint)
    state.restore(trainer(2, rank))
    return torch.equal(torch.rand(3), mine), mine.tolist(), len(checkpoint[CHECKPOINT_KEY]["ranks"])


def test_every_rank_gets_its_own():
    (right, first, count), (also, second, _) = run_ranks(ranks_job)
    assert right
    assert also
    assert first != second
    assert count == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_saved_too():
    device = torch.device("cuda", 0)
    here, checkpoint = trainer(), {}
    here.strategy.root_device = device
    RandomState().save(here, checkpoint)
    first = torch.rand(3, device=device)
    state = RandomState()
    state.load(here, checkpoint)
    state.restore(here)
    assert torch.equal(torch.rand(3, device=device), first)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_restores_nothing(stage):
    callback = QuantizationCallback("w8a8")
    run = trainer(5)
    run.callbacks, run.state = (
        [],
        SimpleNamespace(fn={"validate": TrainerFn.VALIDATING, "test": TrainerFn.TESTING, "predict": TrainerFn.PREDICTING}[stage]),
    )
    callback.on_load_checkpoint(run, mlp(), saved())  # a warning about the five processes would be an error
    assert callback._random._loaded is None


# ---------------------------------------------------------------- ranges, the other state that only training may move


class Watched(pl.LightningModule):
    """Notes the ranges before and after each stage; evaluation sees ten times larger inputs."""

    def __init__(self):
        super().__init__()
        self.net, self.notes = mlp().train(), []

    def ranges(self):
        found = [module for module in self.modules() if isinstance(module, RunningRange)]
        assert found
        return torch.cat([torch.cat(list(module.buffers())) for module in found])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def look(self, batch, batch_idx):
        before = self.ranges()
        self.net(batch * 10)
        self.notes.append((str(self.trainer.state.stage), torch.equal(before, self.ranges())))

    validation_step = test_step = predict_step = look

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_ranges_move_in_training_only():
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    scheme = QuantScheme(weight=TensorSpec(bits=8), input=TensorSpec(bits=8, granularity="tensor", dynamic=False))
    run = pl.Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=1, callbacks=[QuantizationCallback(scheme)], **quiet)
    module, loader = Watched(), DataLoader(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), batch_size=4)
    run.fit(module, loader, loader)
    trained = module.ranges()
    assert trained.isfinite().any()
    assert trained[trained.isfinite()].abs().max() > 0
    for stage in (run.validate, run.test, run.predict):
        stage(module, loader, **({} if stage == run.predict else {"verbose": False}))
    assert torch.equal(module.ranges(), trained)
    assert all(same for _, same in module.notes)
    assert {name for name, _ in module.notes} == {
        f"RunningStage.{name}" for name in ("SANITY_CHECKING", "VALIDATING", "TESTING", "PREDICTING")
    }
