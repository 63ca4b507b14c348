"""Data-free distillation of a quantized student: LLM-QAT (arXiv 2305.17888), section 3.3."""

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_qat.distillation.batches import Batch, check_packing, read_batch
from lightning_qat.distillation.lora import LoraSettings, add_lora
from lightning_qat.distillation.models import build_models
from lightning_qat.distillation.objective import Objective
from lightning_qat.distillation.pair import TeacherAndStudent
from lightning_qat.distillation.passes import check_head
from lightning_qat.evaluation import TokenPerplexity
from lightning_qat.modules import scheme_of
from lightning_qat.scheme import QuantScheme
from lightning_qat.twin import warn_of_twin


class DistillationModule(TeacherAndStudent):
    """Trains a student to give the teacher's distribution over the next token.

    Batches are dictionaries, as :class:`~lightning_qat.SyntheticDataModule` gives, of int64 [batch, tokens]: ``input_ids``;
    ``attention_mask``; optionally ``loss_mask``, 1 where the distribution over the next token is trained on (default: every real token);
    optionally ``position_ids``, where several samples share a row and each begins at 0. Without a teacher they hold ``teacher`` too, its
    distributions: :class:`~lightning_qat.losses.TopK` or logits [batch, tokens, vocabulary].

    The teacher is frozen, stays in eval mode and is never saved in checkpoints.
    Training logs ``train/loss`` and, at the Trainer's logging interval, ``train/kl``.
    Validation logs ``val/kl``, ``val/top1`` and ``val/ppl_generated`` on generated samples and ``val/ppl_text`` on real text. Where only
    the most probable tokens are known, all others count as one, so both kinds of ``kl`` are lower bounds.

    Args:
        teacher: Folder, hub id, ``tiny-teacher``, or a causal language model in memory; None trains from the distributions in the batches.
        student: The same, or None for a copy of the teacher.
        loss: What to train on, one loss or several that are added up (:mod:`lightning_qat.losses`); default the paper's soft
            cross-entropy. A module of your own is called with (student logits, teacher logits or ``TopK``, mask of what counts) and asks
            for ``loss_chunk=None``. A loss of attention probabilities switches both models to eager attention.
        optimizer: Called with the student's parameters.
        lr_scheduler: Called with the optimizer; stepped once per optimizer step.
        gradient_checkpointing: Recompute the student's blocks in the backward pass: less memory, about a third more time.
        teacher_dtype: Dtype of a teacher loaded by name; the student's weights are always fp32.
        teacher_quantization: ``nf4`` or ``int8``: load the teacher in 4 or 8 bits (bitsandbytes).
        teacher_offload: Keep the teacher in CPU memory, and one of its blocks at a time on the device.
        loss_chunk: Tokens whose logits exist at once, of teacher and student; None computes all at once.
        lora: Train adapters on top of the quantized weights, and nothing else (:class:`~lightning_qat.distillation.LoraSettings`).
        defer_loading: Build teacher and student without weights and read them when the Trainer has its processes: rank 0 reads, and
            under ``ModelParallelStrategy`` every rank keeps its share of each block only. For models that not every process can hold.
        param_dtype: Dtype in which ``ModelParallelStrategy`` gathers the student's weights: ``bfloat16`` halves the traffic, and trains
            the grid of the rounded weights (checkpoints say so, and exports write it). None gathers them in fp32.

    Raises:
        ValueError: Teacher or student cannot be loaded, both are None, or their vocabularies differ; settings that exclude each other.
    """

    def __init__(
        self,
        teacher: str | nn.Module | None = None,
        student: str | nn.Module | None = None,
        loss: nn.Module | list[nn.Module] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        teacher_dtype: str = "float32",
        teacher_quantization: Literal["nf4", "int8"] | None = None,
        teacher_offload: bool = False,
        loss_chunk: int | None = 1024,
        lora: LoraSettings | None = None,
        defer_loading: bool = False,
        param_dtype: Literal["bfloat16", "float16"] | None = None,
    ) -> None:
        super().__init__()
        warn_of_twin()
        given = {
            "teacher": teacher,
            "student": student,
            "gradient_checkpointing": gradient_checkpointing,
            "teacher_dtype": teacher_dtype,
            "teacher_quantization": teacher_quantization,
            "teacher_offload": teacher_offload,
            "loss_chunk": loss_chunk,
            "lora": None if lora is None else asdict(LoraSettings.parse(lora)),
            "defer_loading": defer_loading,
            "param_dtype": param_dtype,
        }
        # Only plain values: torch refuses to load callables and modules from a checkpoint.
        self.save_hyperparameters({k: v for k, v in given.items() if not isinstance(v, nn.Module)})
        self.objective = Objective(loss, loss_chunk)
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.teacher, self.student = build_models(self.hparams, teacher, student)
        self.check_vocabularies()
        if lora is not None:
            add_lora(self.student, LoraSettings.parse(lora))
        self._prepare_layers()
        if gradient_checkpointing:
            # Newer transformers renamed the method and warn about the old name.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            getattr(self.student, next(name for name in names if hasattr(self.student, name)))()
        self.ppl_text, self.ppl_generated = TokenPerplexity(), TokenPerplexity()
        self.kl, self.top1 = MeanMetric(), MeanMetric()
        self._packing_checked = False

    def _prepare_layers(self) -> None:
        if self.objective.needs and self.teacher is None:
            raise ValueError(f"loss: {self.objective.layers[0].name} compares layers with those of a teacher; pass teacher=")
        if "attentions" in self.objective.needs:
            for _, model in self.models():
                model.set_attn_implementation("eager")  # no other returns probabilities

    @override
    def configure_callbacks(self) -> list[Any]:
        """The first hook of a run, before data is generated: refuse what would fail, or train for nothing, after it."""
        callbacks = super().configure_callbacks()
        if self.trainer.state.fn == "fit":
            self._check_fit()
        return callbacks

    def _check_fit(self) -> None:
        if hasattr(self.student, "_orig_mod"):
            raise MisconfigurationException(
                "student: is wrapped by torch.compile, which gives its weights other names in checkpoints; call module.student.compile() "
                "in place of module.student = torch.compile(module.student)"
            )
        coming = any(isinstance(getattr(callback, "scheme", None), QuantScheme) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if scheme_of(self.student) is None and not coming:
            raise MisconfigurationException(
                "DistillationModule: the student holds no quantizers; add QuantizationCallback(scheme) to the Trainer's callbacks"
            )
        if self.objective.chunk is None:
            return
        if getattr(self.trainer.strategy, "zero_stage_3", False):
            raise MisconfigurationException(
                "loss_chunk: DeepSpeed ZeRO-3 holds the head's weight in its own call only; pass loss_chunk=None"
            )
        parameter = next(self.student.parameters())
        if not parameter.is_meta and not isinstance(self.student, FSDPModule):
            check_head(self.student, "student", parameter.device)

    @override
    def on_fit_start(self) -> None:
        """Refuse what can only be told now."""
        size = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        own, who = self.vocab_size(self.student), "student" if self.teacher is None else "teacher"
        if size is not None and size != own:
            raise MisconfigurationException(f"data: tokens come from a vocabulary of {size}, the {who} has {own}; use the same teacher")
        if self.teacher is not None:
            warnings.filterwarnings("ignore", message=f"Found {sum(1 for _ in self.teacher.modules())} module.s. in eval mode")
        if self.objective.chunk is not None:
            for name, model in self.models():
                check_head(model, name, self.device)
        self.reshard()

    @override
    @torch.inference_mode(False)
    def on_validation_start(self) -> None:
        """Begin with sums that training may go on with: those born in `Trainer.validate`'s inference mode cannot be changed outside it."""
        for metric in (self.ppl_text, self.ppl_generated, self.kl, self.top1):
            metric.reset()

    @override
    def on_validation_end(self) -> None:
        """Give back what validation has gathered."""
        self.reshard()

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch of generated samples."""
        read = self._read(batch)
        # The loss moves with the entropy of each batch; what training can change is the KL divergence.
        values = self.objective(self.student, self.teacher, read, ("kl",) if self._logs_now() and self._has_teacher(read) else ())
        loss = values.pop("loss")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(read.ids))
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=len(read.ids))
        return loss

    def _read(self, batch: Any) -> Batch:
        read = read_batch(batch)
        if read.positions is not None and not self._packing_checked:
            for _, model in self.models():
                check_packing(model)
            self._packing_checked = True
        if self.objective.needs_teacher and not read.is_text and not self._has_teacher(read):
            raise MisconfigurationException(
                "data: the batch holds no distributions of a teacher, and DistillationModule has no teacher; "
                "set teacher_logits=32 in SyntheticDataModule, or pass teacher= to DistillationModule"
            )
        return read

    def _has_teacher(self, batch: Batch) -> bool:
        return self.teacher is not None or batch.teacher is not None

    def _logs_now(self) -> bool:
        trainer = getattr(self, "_trainer", None)
        return trainer is not None and (self.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generated samples against the teacher; real text on its own."""
        read = self._read(batch)
        options: dict[str, Any] = {"batch_size": len(read.ids), "add_dataloader_idx": False}
        if read.is_text:
            self.ppl_text.update(*self.objective.nats(self.student, read))
            self.log("val/ppl_text", self.ppl_text, prog_bar=True, **options)
            return
        self.ppl_generated.update(*self.objective.nats(self.student, read))
        self.log("val/ppl_generated", self.ppl_generated, **options)
        if self._has_teacher(read):
            tokens = read.counts.sum()
            for name, value in self.objective.measure(self.student, self.teacher, read, ("kl", "top1")).items():
                metric = getattr(self, name)
                metric.update(value, tokens)
                self.log(f"val/{name}", metric, prog_bar=name == "kl", **options)

    @override
    def configure_optimizers(self) -> Any:
        """Called after quantizers are in place, so learned ones are included."""
        optimizer = self.make_optimizer(p for p in self.student.parameters() if p.requires_grad)
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}}
