"""A run that uses every kind of state, its end as plain tensors, and what differs between two ends."""

import logging
import os
import random
import warnings
from contextlib import contextmanager
from functools import partial

import lightning.pytorch as pl
import numpy
import torch
from learned import LearnedGain
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import ModelParallelStrategy
from models import llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_qat import DistillationModule, QuantizationCallback, QuantScheme, SyntheticDataModule, TensorSpec
from lightning_qat.quantizers import quantizers

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}


class Stop(EarlyStopping):
    """Never stops, looks at a metric of training (what validation found is not kept), and notes when it looked."""

    def __init__(self):
        super().__init__("loss", patience=1000, strict=False)
        self.looked = set()

    def _run_early_stopping_check(self, trainer):
        self.looked.add(trainer.global_step)
        super()._run_early_stopping_check(trainer)


@contextmanager
def learned_and_static():
    """A scheme with learned scales of weights, and static inputs that remember their range."""
    quantizers.add("learned-gain", LearnedGain)
    inputs = TensorSpec(bits=8, granularity="tensor", dynamic=False)
    try:
        yield QuantScheme(weight=TensorSpec(bits=4, quantizer="learned-gain"), input=inputs, exclude=())
    finally:
        del quantizers._entries["learned-gain"]


class Student(pl.LightningModule):
    """Dropout, a schedule that moves in every step, and a diary of what it was shown."""

    def __init__(self, estimate=False):
        super().__init__()
        self.net, self.estimate, self.seen = None, estimate, []

    def configure_model(self):
        if self.net is not None:
            return
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)  # the same weights on all ranks
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))
        torch.random.set_rng_state(generator)
        if hasattr(self, "after_build"):
            self.after_build()
        if self.device_mesh is not None:
            for module in (self.net[0], self.net[3], self.net):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        x = batch if isinstance(batch, torch.Tensor) else functional.one_hot(batch["input_ids"] % 8, 8).float()
        self.seen.append(x)
        loss = (self.net(x) - 1).square().mean()
        self.log("loss", loss, sync_dist=True)  # else callbacks differ by rank, and Lightning saves those of rank 0 only
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x = batch if isinstance(batch, torch.Tensor) else functional.one_hot(batch["input_ids"] % 8, 8).float()
        self.log("val", self.net(x).square().mean(), add_dataloader_idx=False, sync_dist=True)

    def configure_optimizers(self):
        total = self.trainer.estimated_stepping_batches if self.estimate else 12
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + step % 5) / (1 + total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Augmented(Dataset):
    """Draws from all three generators for each item, in the main process."""

    def __init__(self, size=24):
        self.items = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index] + torch.rand(()) + numpy.random.rand() + random.random()


class Onwards(Sampler):
    """All items, or in the first epoch after loading a state those that are left."""

    def __init__(self, size):
        self.size, self.first = size, 0

    def __len__(self):
        return self.size

    def __iter__(self):
        first, self.first = self.first, 0
        return iter(range(first, self.size))


class CountingLoader(DataLoader):
    """Somebody else's loader that can resume: it counts the batches it gave."""

    def __init__(self, dataset, batch_size):
        self.place = Onwards(len(dataset))
        super().__init__(dataset, batch_size=batch_size, sampler=self.place)
        self.given = 0

    def __iter__(self):
        self.given = self.place.first // self.batch_size
        return self.count(super().__iter__())

    def count(self, batches):
        for batch in batches:
            self.given += 1
            yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.place.first = state["given"] % len(self) * self.batch_size


class ForeignData(pl.LightningDataModule):
    """Augmented items: from a loader that can resume, or shuffled with torch's global generator."""

    def __init__(self, shuffle=False):
        super().__init__()
        self.shuffle, self.allow_zero_length_dataloader_with_multiple_devices = shuffle, False

    def train_dataloader(self):
        return DataLoader(Augmented(), batch_size=4, shuffle=True) if self.shuffle else CountingLoader(Augmented(), 4)

    def val_dataloader(self):
        return DataLoader(Augmented().items[:4], batch_size=2)


def strategy(kind):
    """A strategy by its short name, for two processes unless it is "single"."""
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if kind == "fsdp2-file":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return "ddp" if kind == "ddp" else "auto"


def world(kind):
    return 1 if kind == "single" else 2


def train(kind, data, scheme, ckpt_path=None, callbacks=(), module=None, seed=0, quiet=True, **limits):
    """One run; returns its trainer."""
    if quiet:
        warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank = int(os.environ.get("RANK", "0"))
    for seed_it in (torch.manual_seed, numpy.random.seed, random.seed):
        seed_it(100 * seed + rank)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world(kind),
        strategy=strategy(kind),
        callbacks=[QuantizationCallback(scheme), Stop(), *callbacks],
        enable_checkpointing=bool(callbacks),
        **QUIET | {"use_distributed_sampler": False} | limits,
    )
    trainer.fit(Student() if module is None else module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def local(value):
    return value.to_local() if hasattr(value, "to_local") else value


def tensors(value, name=""):
    """All leaves of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in tensors(item, f"{name}.{key}").items()}
    return {name: local(value).detach().clone() if isinstance(value, torch.Tensor) else value}


def end_of(trainer):
    """Everything that a later step would depend on, and the last batches that were shown."""
    module = trainer.lightning_module
    stop = trainer.early_stopping_callback.state_dict()
    states = {
        "weights": dict(module.named_parameters()),
        "buffers": {name: buffer for name, buffer in module.named_buffers() if "batch_" not in name},
        "optimizer": [list(optimizer.state.values()) for optimizer in trainer.optimizers],
        "groups": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callback": stop,
        "progress": [trainer.global_step, trainer.current_epoch, trainer.fit_loop.total_batch_idx],
        "random": [torch.get_rng_state(), torch.tensor(numpy.random.get_state()[1].astype("int64")), *random.getstate()[1]],
        "place": numpy.random.get_state()[2],
    }
    return {"states": tensors(states), "seen": getattr(module, "seen", [])}


def differences(whole, resumed):
    """The names of what is not the same to the last bit; the resumed run's batches must be the last ones of the whole run."""
    names = set(whole["states"]) ^ set(resumed["states"])
    for name in whole["states"].keys() & resumed["states"].keys():
        one, other = whole["states"][name], resumed["states"][name]
        if not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other):
            names.add(name)
    last = whole["seen"][len(whole["seen"]) - len(resumed["seen"]) :]
    if not all(torch.equal(a, b) for a, b in zip(last, resumed["seen"], strict=True)):
        names.add("seen")
    return sorted(names)


def synthetic(folder, **changes):
    """16 samples for training, two for validation; read from a store where it is there."""
    teacher = None if (folder / "store.json").exists() else llama(eos_token_id=list(range(90, 97)))
    settings = {"num_samples": 18, "max_length": 12, "rows": 8, "batch_size": 2, "val_samples": 2, "store": folder}
    return SyntheticDataModule(**{"teacher": teacher} | settings | changes)


def distillation():
    """The paper's recipe with a tiny model, and dropout."""
    return DistillationModule(llama(), llama(attention_dropout=0.2), optimizer=partial(torch.optim.AdamW, lr=1e-2))
