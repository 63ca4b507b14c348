"""Strategies and precisions that need a GPU; one is enough."""

import pytest
import torch
from distil import Losses, loader, module, weights
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_qat import QuantizationCallback
from lightning_qat.modules.weights import weight_dtypes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def train(strategy="auto", precision="32-true", steps=3, **options):
    losses, made = Losses(), module(dtype=None, **options)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        strategy=strategy, accelerator="gpu", devices=1, precision=precision, max_steps=steps, num_sanity_val_steps=0,
        use_distributed_sampler=False, callbacks=[QuantizationCallback("w4a8kv4"), losses], **quiet,
    )  # fmt: skip
    trainer.fit(made, loader(1))
    return losses.values, made


def test_fsdp_trains_what_one_device_trains():
    expected, _ = train()
    found, _ = train(FSDPStrategy())
    assert found == pytest.approx(expected, rel=1e-4)


def test_fsdp_in_bf16_remembers_the_weights_that_it_rounded():
    _, made = train(FSDPStrategy(), "bf16-mixed")
    assert set(weight_dtypes(made.student).values()) == {"bfloat16"}


def test_fsdp2_trains_what_one_device_trains():
    expected, alone = train()
    found, made = train(ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1))
    assert found == pytest.approx(expected, rel=1e-4)
    assert weights(made.student).keys() == weights(alone.student).keys()


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_half_precision_follows_full_precision(precision):
    expected, _ = train()
    found, _ = train(precision=precision)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_what_one_device_trains(stage):
    pytest.importorskip("deepspeed")
    expected, _ = train(precision="bf16-mixed")
    found, _ = train(DeepSpeedStrategy(stage=stage), "bf16-mixed", loss_chunk=None if stage == 3 else 1024)
    assert found == pytest.approx(expected, rel=0.05)


def test_an_offloaded_teacher_teaches_the_same():
    expected, _ = train()
    found, made = train(teacher_offload=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert all(parameter.device.type == "cpu" for parameter in made.teacher.parameters())
