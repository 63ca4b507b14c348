"""Data-free distillation of a quantized student: LLM-QAT (arXiv 2305.17888), section 3.3."""

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

from lightning_qat.distillation.batches import Batch, check_packing, read_batch
from lightning_qat.distillation.lora import LoraSettings, add_lora
from lightning_qat.distillation.models import build_student, distribute, skeletons
from lightning_qat.evaluation import TokenPerplexity
from lightning_qat.generation import check_causal_lm, load_causal_lm
from lightning_qat.losses import SoftCrossEntropy, TopK, divergence, most_probable
from lightning_qat.modules import insert_quantizers, scheme_of
from lightning_qat.modules.weights import WEIGHT_DTYPES, set_weight_dtypes, weight_dtypes
from lightning_qat.scheme import QuantScheme
from lightning_qat.twin import warn_of_twin


class DistillationModule(pl.LightningModule):
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
        loss: Called with (student logits, teacher logits or ``TopK``, mask of what counts); default the paper's soft cross-entropy.
        optimizer: Called with the student's parameters.
        lr_scheduler: Called with the optimizer; stepped once per optimizer step.
        gradient_checkpointing: Recompute the student's blocks in the backward pass: less memory, about a third more time.
        teacher_dtype: Dtype of a teacher loaded by name; the student's weights are always fp32.
        defer_loading: Build teacher and student without weights and read them when the Trainer has its processes: rank 0 reads, and
            under ``ModelParallelStrategy`` every rank keeps its share of each block only. For models that not every process can hold.
        param_dtype: Dtype in which ``ModelParallelStrategy`` gathers the student's weights: ``bfloat16`` halves the traffic, and trains
            the grid of the rounded weights (checkpoints say so, and exports write it). None gathers them in fp32.
        lora: Train LoRA adapters of the student (its linear layers) instead of its weights; needs the extra ``lora``. Call
            :func:`~lightning_qat.merge_lora` before exporting.

    Raises:
        ValueError: Teacher or student cannot be loaded, both are None, or their vocabularies differ.
    """

    quantization_root = "student"
    teacher: Any  # models of transformers, whose methods torch's types do not know
    student: Any

    def __init__(
        self,
        teacher: str | nn.Module | None = None,
        student: str | nn.Module | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        teacher_dtype: str = "float32",
        defer_loading: bool = False,
        param_dtype: str | None = None,
        lora: LoraSettings | None = None,
    ) -> None:
        super().__init__()
        warn_of_twin()
        # Only plain values: torch refuses to load callables and modules from a checkpoint.
        plain = {
            "teacher": teacher,
            "student": student,
            "gradient_checkpointing": gradient_checkpointing,
            "teacher_dtype": teacher_dtype,
            "defer_loading": defer_loading,
            "param_dtype": param_dtype,
        }
        plain["lora"] = None if lora is None else vars(LoraSettings.parse(lora))
        self.save_hyperparameters({k: v for k, v in plain.items() if v is None or isinstance(v, str | bool | dict)})
        if teacher is None and student is None:
            raise ValueError("student: needed when teacher is None; pass a folder, a hub id or a causal language model, or give a teacher")
        if param_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"param_dtype: got {param_dtype!r}, expected 'bfloat16', 'float16' or None for the weights' own")
        self.param_dtype = None if param_dtype is None else getattr(torch, param_dtype)
        if defer_loading:
            self.teacher, self.student = skeletons(teacher, student, teacher_dtype)
        else:
            self.teacher = load_causal_lm(teacher, teacher_dtype) if isinstance(teacher, str) else teacher
            self.student = build_student(self.teacher, teacher, student)
        if self.teacher is not None:
            check_causal_lm(self.teacher, "teacher").requires_grad_(False).eval()
        self._check_vocabularies()
        if lora is not None:
            if defer_loading:
                raise ValueError(
                    "defer_loading: got True with lora, whose adapters are drawn before weights are read; leave one of them out"
                )
            add_lora(self.student, LoraSettings.parse(lora))
        self.loss = SoftCrossEntropy() if loss is None else loss
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        if gradient_checkpointing:
            # Newer transformers renamed the method and warn about the old name.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            getattr(self.student, next(name for name in names if hasattr(self.student, name)))()
        self.ppl_text, self.ppl_generated = TokenPerplexity(), TokenPerplexity()
        self.kl, self.top1 = MeanMetric(), MeanMetric()
        self._packing_checked = False

    def _check_vocabularies(self) -> None:
        own = self._vocab_size(self.student)
        if self.teacher is not None and (size := self._vocab_size(self.teacher)) != own:
            raise ValueError(f"student: its vocabulary has {own} tokens, the teacher's {size}; logits cannot be compared")

    @staticmethod
    def _vocab_size(model: Any) -> int:
        return model.get_input_embeddings().weight.shape[0]

    @override
    def train(self, mode: bool = True) -> "DistillationModule":
        """The teacher stays in eval mode whatever happens to the rest."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    @override
    def configure_model(self) -> None:
        """Under `ModelParallelStrategy` shard teacher and student, behind the quantizers; read the weights that were deferred."""
        vars(self).get("after_build", lambda: None)()  # put there by QuantizationCallback
        distribute(self)

    @override
    def on_fit_start(self) -> None:
        """Refuse what would train for nothing."""
        if scheme_of(self.student) is None:
            raise MisconfigurationException(
                "DistillationModule: the student holds no quantizers; add QuantizationCallback(scheme) to the Trainer's callbacks"
            )
        size = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", None)
        own, who = self._vocab_size(self.student), "student" if self.teacher is None else "teacher"
        if size is not None and size != own:
            raise MisconfigurationException(f"data: tokens come from a vocabulary of {size}, the {who} has {own}; use the same teacher")
        if self.teacher is not None:
            warnings.filterwarnings("ignore", message=f"Found {sum(1 for _ in self.teacher.modules())} module.s. in eval mode")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The student's logits, [batch, tokens, vocabulary]."""
        return _logits(self.student, input_ids, attention_mask, position_ids)

    @torch.no_grad()
    def teacher_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The teacher's logits, [batch, tokens, vocabulary]."""
        return _logits(self.teacher, input_ids, attention_mask, position_ids)

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One batch of generated samples."""
        read = self._read(batch)
        logits, teacher = self(**read.inputs), self._teacher_of(read)
        loss = self.loss(logits, teacher, read.counts)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(read.ids))
        if self._logs_now():
            # The loss moves with the entropy of each batch; what training can change is the KL divergence.
            self.log("train/kl", divergence(logits.detach(), teacher, read.counts), batch_size=len(read.ids))
        return loss

    def _read(self, batch: Any) -> Batch:
        read = read_batch(batch)
        if read.positions is not None and not self._packing_checked:
            for model in (self.student, self.teacher):
                if model is not None:
                    check_packing(model)
            self._packing_checked = True
        return read

    def _teacher_of(self, batch: Batch) -> Tensor | TopK:
        """The teacher's own logits where there is a teacher, for they are exact; else what the batch holds."""
        if self.teacher is not None:
            return self.teacher_logits(**batch.inputs)
        if batch.teacher is None:
            raise MisconfigurationException(
                "data: the batch holds no distributions of a teacher, and DistillationModule has no teacher; "
                "set teacher_logits=32 in SyntheticDataModule, or pass teacher= to DistillationModule"
            )
        return batch.teacher

    def _logs_now(self) -> bool:
        trainer = getattr(self, "_trainer", None)
        return trainer is not None and (self.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Generated samples against the teacher; real text on its own."""
        read = self._read(batch)
        logits = self(**read.inputs)
        options: dict[str, Any] = {"batch_size": len(read.ids), "add_dataloader_idx": False}
        if read.is_text:
            self.ppl_text.update(logits, read.ids, read.scored)
            self.log("val/ppl_text", self.ppl_text, prog_bar=True, **options)
            return
        teacher, tokens = self._teacher_of(read), read.counts.sum()
        self.ppl_generated.update(logits, read.ids, read.scored)
        self.kl.update(divergence(logits, teacher, read.counts), tokens)
        self.top1.update((logits.argmax(-1) == most_probable(teacher))[read.counts.bool()].float().mean(), tokens)
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
        checkpoint[WEIGHT_DTYPES] = weight_dtypes(self.student)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Insert the quantizers that the checkpoint was trained with, unless they are there."""
        if checkpoint.get("quantization_scheme") is not None and scheme_of(self.student) is None:
            insert_quantizers(self.student, QuantScheme.parse(checkpoint["quantization_scheme"]), allow_partial=True)
        set_weight_dtypes(self.student, checkpoint.get(WEIGHT_DTYPES, {}))


def _logits(model: Any, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    positions = {} if position_ids is None else {"position_ids": position_ids}  # not every model takes them
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits
