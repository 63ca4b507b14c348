"""Data-free distillation of a quantized student: LLM-QAT (arXiv 2305.17888), section 3.3."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_qat.evaluation import TokenPerplexity
from lightning_qat.generation import cast_parameters, check_causal_lm, load_causal_lm
from lightning_qat.losses import SoftCrossEntropy, kl_divergence
from lightning_qat.modules import insert_quantizers, scheme_of
from lightning_qat.scheme import QuantScheme


class DistillationModule(pl.LightningModule):
    """Trains a student to give the teacher's distribution over the next token.

    Batches are dictionaries with ``input_ids`` and ``attention_mask`` (int64, [batch, tokens]), as
    :class:`~lightning_qat.SyntheticDataModule` gives. The teacher is frozen, stays in eval mode and is never saved in checkpoints.
    Training logs ``train/loss`` and, at the Trainer's logging interval, ``train/kl``.
    Validation logs ``val/kl``, ``val/top1`` and ``val/ppl_generated`` on generated samples and ``val/ppl_text`` on real text.

    Args:
        teacher: Folder, hub id, ``tiny-teacher``, or a causal language model in memory.
        student: The same, or None for a copy of the teacher.
        loss: Called with (student logits, teacher logits, attention mask); default the paper's soft cross-entropy.
        optimizer: Called with the student's parameters.
        lr_scheduler: Called with the optimizer; stepped once per optimizer step.
        gradient_checkpointing: Recompute the student's blocks in the backward pass: less memory, about a third more time.
        teacher_dtype: Dtype of a teacher loaded by name; the student's weights are always fp32.

    Raises:
        ValueError: Teacher or student cannot be loaded, or their vocabularies differ.
    """

    quantization_root = "student"
    teacher: Any  # models of transformers, whose methods torch's types do not know
    student: Any

    def __init__(
        self,
        teacher: str | nn.Module,
        student: str | nn.Module | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        teacher_dtype: str = "float32",
    ) -> None:
        super().__init__()
        # Only plain values: torch refuses to load callables and modules from a checkpoint.
        plain = {"teacher": teacher, "student": student, "gradient_checkpointing": gradient_checkpointing, "teacher_dtype": teacher_dtype}
        self.save_hyperparameters({k: v for k, v in plain.items() if v is None or isinstance(v, str | bool)})
        self.teacher = load_causal_lm(teacher, teacher_dtype) if isinstance(teacher, str) else check_causal_lm(teacher, "teacher")
        self.teacher.requires_grad_(False).eval()
        self.student = self._build_student(teacher, student)
        self._check_vocabularies()
        self.loss = SoftCrossEntropy() if loss is None else loss
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        if gradient_checkpointing:
            # Newer transformers renamed the method and warn about the old name.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            getattr(self.student, next(name for name in names if hasattr(self.student, name)))()
        self.ppl_text, self.ppl_generated = TokenPerplexity(), TokenPerplexity()
        self.kl, self.top1 = MeanMetric(), MeanMetric()

    def _build_student(self, teacher: str | nn.Module, student: str | nn.Module | None) -> nn.Module:
        if student is None:
            same = isinstance(teacher, nn.Module) or next(self.teacher.parameters()).dtype == torch.float32
            model = copy.deepcopy(self.teacher) if same else load_causal_lm(str(teacher), "float32")
            return cast_parameters(model, torch.float32).requires_grad_(True).train()
        if student is teacher and not isinstance(student, str):
            raise ValueError("student: is the teacher itself; pass None for a copy of it")
        model = load_causal_lm(student, "float32") if isinstance(student, str) else check_causal_lm(student, "student")
        return cast_parameters(model, torch.float32).train()

    def _check_vocabularies(self) -> None:
        sizes = [model.get_input_embeddings().weight.shape[0] for model in (self.teacher, self.student)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"student: its vocabulary has {sizes[1]} tokens, the teacher's {sizes[0]}; logits cannot be compared")

    @override
    def train(self, mode: bool = True) -> "DistillationModule":
        """The teacher stays in eval mode whatever happens to the rest."""
        super().train(mode)
        self.teacher.eval()
        return self

    @override
    def on_fit_start(self) -> None:
        """Refuse what would train for nothing."""
        if scheme_of(self.student) is None:
            raise MisconfigurationException(
                "DistillationModule: the student holds no quantizers; add QuantizationCallback(scheme) to the Trainer's callbacks"
            )
        size = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        own = self.teacher.get_input_embeddings().weight.shape[0]
        if size is not None and size != own:
            raise MisconfigurationException(f"data: tokens come from a vocabulary of {size}, the teacher has {own}; use the same teacher")
        warnings.filterwarnings("ignore", message=f"Found {sum(1 for _ in self.teacher.modules())} module.s. in eval mode")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The student's logits, [batch, tokens, vocabulary]."""
        return self.student(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @torch.no_grad()
    def teacher_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The teacher's logits, [batch, tokens, vocabulary]."""
        return self.teacher(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch of generated samples."""
        ids, mask = _read_batch(batch)
        logits, teacher = self(ids, mask), self.teacher_logits(ids, mask)
        loss = self.loss(logits, teacher, mask)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(ids))
        if self._logs_now():
            # The loss moves with the entropy of each batch; what training can change is the KL divergence.
            self.log("train/kl", kl_divergence(logits.detach(), teacher, mask), batch_size=len(ids))
        return loss

    def _logs_now(self) -> bool:
        trainer = getattr(self, "_trainer", None)
        return trainer is not None and (self.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generated samples against the teacher; real text on its own."""
        ids, mask = _read_batch(batch)
        logits = self(ids, mask)
        options: dict[str, Any] = {"batch_size": len(ids), "add_dataloader_idx": False}
        if batch.get("source") == "text":
            self.ppl_text.update(logits, ids, mask)
            self.log("val/ppl_text", self.ppl_text, prog_bar=True, **options)
            return
        teacher, tokens = self.teacher_logits(ids, mask), mask.sum()
        self.ppl_generated.update(logits, ids, mask)
        self.kl.update(kl_divergence(logits, teacher, mask), tokens)
        self.top1.update((logits.argmax(-1) == teacher.argmax(-1))[mask.bool()].float().mean(), tokens)
        self.log("val/ppl_generated", self.ppl_generated, **options)
        self.log("val/kl", self.kl, prog_bar=True, **options)
        self.log("val/top1", self.top1, **options)

    @override
    def configure_optimizers(self) -> Any:
        """Called after quantizers are in place, so learned ones are included."""
        optimizer = self.make_optimizer(p for p in self.student.parameters() if p.requires_grad)
        if self.make_lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}}

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything but the teacher."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "") + "teacher."
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        return state

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Strict about everything but the teacher."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not key.startswith("teacher.")]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"DistillationModule: missing keys {missing[:5]}, unexpected keys {result.unexpected_keys[:5]}")
        return result

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the scheme with the weights, so that `load_from_checkpoint` needs no callback."""
        scheme = scheme_of(self.student)
        checkpoint["quantization_scheme"] = None if scheme is None else scheme.to_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Insert the quantizers that the checkpoint was trained with, unless they are there."""
        if checkpoint.get("quantization_scheme") is not None and scheme_of(self.student) is None:
            insert_quantizers(self.student, QuantScheme.parse(checkpoint["quantization_scheme"]), allow_partial=True)


def _read_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """(ids, mask), [batch, tokens]; without a mask every token counts."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise MisconfigurationException(
            f"data: got a batch of type {type(batch).__name__}, expected a dictionary with 'input_ids' and 'attention_mask'"
        )
    mask = batch.get("attention_mask")
    return batch["input_ids"], torch.ones_like(batch["input_ids"]) if mask is None else mask
