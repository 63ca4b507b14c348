"""One short distillation, the same under every strategy: each rank sees its half of every batch."""

import os

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from models import VOCABULARY, tied_llama
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback, QuantScheme, TensorSpec
from lightning_qat.modules.weights import full_weight, layer_weights
from lightning_qat.quantizers.base import quantizers
from lightning_qat.quantizers.minmax import MinMaxQuantizer

BATCH, STEPS = 4, 10


@quantizers.register("learned-for-strategies")
class Learned(MinMaxQuantizer):
    """A scale of its own, one for the whole tensor."""

    def __init__(self, spec):
        super().__init__(spec)
        self.scale = nn.Parameter(torch.full((1,), 0.05))

    def scale_and_zero_point(self, rows):
        return self.scale.expand(rows.shape[0]).unsqueeze(-1), None


LEARNED = QuantScheme(weight=TensorSpec(bits=4, quantizer="learned-for-strategies"))


def strategy(kind, world=2):
    return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1) if kind == "fsdp2" else kind


def loader(world, start=0):
    """The batches of the steps from `start` on; as many as ever, for Lightning counts those that were before."""
    rank = int(os.environ.get("RANK", "0"))
    ids = torch.randint(3, VOCABULARY, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(1))
    ids = ids.roll(-start * BATCH, 0)
    return DataLoader([{"input_ids": row} for row in ids[rank::world]], batch_size=BATCH // world, shuffle=False)


class Losses(pl.Callback):
    """The loss of every step, the mean over ranks."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean").item())


def module(dtype=torch.float64, **options):
    made = DistillationModule(**{"teacher": tied_llama(), "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)} | options)
    if dtype is not None:
        made.student.to(dtype)
        made.teacher.to(dtype)
    return made


def trainer(kind, world, *callbacks, scheme="w4a8kv4", **options):
    return pl.Trainer(
        **{"max_steps": STEPS, "num_sanity_val_steps": 0} | options,
        strategy=strategy(kind, world),
        devices=world,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[QuantizationCallback(scheme), *callbacks],
    )


def weights(model):
    """Every parameter, whole, on every rank."""
    return {name: full_weight(p).detach().clone() for name, p in model.named_parameters()}


def codes(model):
    """The codes of every weight."""
    return {weight.name: weight.codes().codes for weight in layer_weights(model)}


def distil(kind, world, options=None, fit=None, **trainer_options):
    """Losses, weights and codes after a run."""
    losses, made = Losses(), module(**(options or {}))
    trainer(kind, world, losses, **trainer_options).fit(made, loader(world), **(fit or {}))
    return losses.values, weights(made.student), codes(made.student)
