"""What the allocator hands out during a real training step of a Trainer, on the CPU."""

import gc
from typing import Any

import lightning.pytorch as pl
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_qat import DistillationModule, QuantizationCallback


def alive() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Counting(pl.Callback):
    """Counts two steps: what is alive before the first, and the highest rise above it, as the allocator reports each block to torch's
    profiler. From the first on, because the size of a block that is older than the profiler is not reported when it is freed, and the
    second step begins with the gradients of the first.
    """

    peak = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            gc.collect()
            self.before = alive()
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.profiler.stop()
            events = [event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
            total = rise = 0
            for event in sorted(events, key=lambda event: event.start_ns()):
                total += event.nbytes()
                rise = max(rise, total)
            self.peak = self.before + rise


def counted_peak(teacher: Any, student: Any, setting: Any, vocabulary: int) -> int:
    """Two steps of a Trainer, whose metrics are logged; their peak.

    Args:
        teacher: A model, or None: the batches hold stored probabilities.
        student: A model, or None for a copy of the teacher.
        setting: How it is trained (`lightning_qat.plan.Setting`).
        vocabulary: Of both.
    """
    row = {
        "input_ids": torch.randint(vocabulary, (setting.max_length,)),
        "attention_mask": torch.ones(setting.max_length, dtype=torch.int64),
    }
    if teacher is None:
        kept = torch.rand(setting.max_length, 33).softmax(-1)
        ids = torch.arange(32).expand(setting.max_length, 32)
        row["teacher"] = {"ids": ids, "probabilities": kept[:, :32], "tail": kept[:, 32]}
    module = DistillationModule(
        teacher=teacher, student=student, gradient_checkpointing=setting.gradient_checkpointing, loss_chunk=setting.loss_chunk
    )
    counting = Counting()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        precision=setting.precision,
        log_every_n_steps=1,
        callbacks=[QuantizationCallback(setting.scheme), counting],
        **quiet,
    )
    trainer.fit(module, DataLoader([row] * (2 * setting.batch_size), batch_size=setting.batch_size, collate_fn=collate))
    return counting.peak


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As the data module does, without its store."""
    from lightning_qat.losses import TopK

    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask")}
    if "teacher" in rows[0]:
        batch["teacher"] = TopK(*(torch.stack([row["teacher"][key] for row in rows]) for key in TopK._fields))
    return batch
