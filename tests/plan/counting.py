"""What the allocator hands out during a real training step of a Trainer, on the CPU."""

import gc
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_qat import DistillationModule, QuantizationCallback
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader


def alive() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    found = (t for t in gc.get_objects() if isinstance(t, torch.Tensor) and type(t) in (torch.Tensor, torch.nn.Parameter))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}.values())


def allocated_peak(step: Callable[[], Any]) -> int:
    """The highest sum of what is alive, as the allocator's own reports to torch's profiler tell it."""
    gc.collect()
    before = alive()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return before + peak


class Counting(pl.Callback):
    """Counts one batch, from its start to behind the optimizer's step; `index` is the second or a later one."""

    def __init__(self, index: int = 1) -> None:
        self.index, self.peak = index, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.index:
            gc.collect()
            self.before = alive()
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.index:
            self.profiler.__exit__(None, None, None)
            events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            total = highest = 0
            for event in sorted(events, key=lambda e: e.start_ns()):
                total += event.nbytes()
                highest = max(highest, total)
            self.peak = self.before + highest


def counted_peak(teacher: Any, student: Any, setting: Any, **module: Any) -> int:
    """Two steps of a Trainer; the peak of the second, which is logged."""
    rows = [{"input_ids": torch.randint(1, 1000, (setting.max_length,))} for _ in range(2 * setting.batch_size)]
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    counting = Counting()
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", devices=1, precision=setting.precision, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, callbacks=[QuantizationCallback(setting.scheme), counting],
    )
    trainer.fit(DistillationModule(teacher=teacher, student=student, gradient_checkpointing=setting.gradient_checkpointing, **module), DataLoader(rows, batch_size=setting.batch_size))
    return counting.peak
