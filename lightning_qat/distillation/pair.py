"""A teacher and its student in one LightningModule: how they are moved, sharded, saved and loaded."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_qat.distillation.models import check_strategy, distribute
from lightning_qat.distillation.teachers import move_teacher, outside_ddp
from lightning_qat.modules import insert_quantizers, scheme_of
from lightning_qat.modules.weights import WEIGHT_DTYPES, set_weight_dtypes, weight_dtypes
from lightning_qat.scheme import QuantScheme


class TeacherAndStudent(pl.LightningModule):
    """Holds both; what is trained on is up to the subclass, which builds them in its constructor.

    The teacher is frozen and stays in eval mode, is moved but never cast, and is never saved. The student's quantizers are saved as their
    scheme, so that `load_from_checkpoint` needs no callback.

    Attributes:
        teacher: The teacher, or None.
        student: The student; quantizers are inserted below it.
    """

    quantization_root = "student"
    teacher: Any  # models of transformers, whose methods torch's types do not know
    student: Any

    def models(self) -> list[tuple[str, Any]]:
        """(``student`` or ``teacher``, model) of those that there are."""
        return [(name, model) for name in ("student", "teacher") if (model := getattr(self, name)) is not None]

    def check_vocabularies(self) -> None:
        """Refuse a pair whose logits are of different tokens.

        Raises:
            ValueError: Their vocabularies differ in size.
        """
        own = self.vocab_size(self.student)
        if self.teacher is not None and (size := self.vocab_size(self.teacher)) != own:
            raise ValueError(f"student: its vocabulary has {own} tokens, the teacher's {size}; logits cannot be compared")

    @staticmethod
    def vocab_size(model: Any) -> int:
        """Number of a model's token ids."""
        return int(model.get_input_embeddings().weight.shape[0])

    @override
    def train(self, mode: bool = True) -> "TeacherAndStudent":
        """The teacher stays in eval mode whatever happens to the rest."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TeacherAndStudent":
        """Move everything; what casts the student leaves the teacher as it was loaded."""
        teacher, self.teacher = self.teacher, None
        try:
            super()._apply(fn, recurse)
        finally:
            self.teacher = teacher
        move_teacher(teacher, fn)
        return self

    @override
    def configure_callbacks(self) -> list[Any]:
        """The first hook of a run: refuse, before data is generated, what its strategy cannot do."""
        check_strategy(self.trainer, self.hparams["param_dtype"])
        return []

    @override
    def configure_model(self) -> None:
        """Under `ModelParallelStrategy` shard teacher and student, behind the quantizers; read the weights that were deferred."""
        vars(self).get("after_build", lambda: None)()  # put there by QuantizationCallback
        distribute(self)
        self._ddp_params_and_buffers_to_ignore = [f"teacher.{name}" for name in outside_ddp(self.teacher)]  # read by DDP

    def reshard(self) -> None:
        """What lies outside the blocks is gathered by a forward pass and given back by a backward pass; some passes have none."""
        for _, model in self.models():
            if isinstance(model, FSDPModule):
                model.reshard()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The student's logits, [batch, tokens, vocabulary]."""
        return _logits(self.student, input_ids, attention_mask, position_ids)

    @torch.no_grad()
    def teacher_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """The teacher's logits, [batch, tokens, vocabulary]."""
        return _logits(self.teacher, input_ids, attention_mask, position_ids)

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
            raise RuntimeError(f"{type(self).__name__}: missing keys {missing[:5]}, unexpected keys {result.unexpected_keys[:5]}")
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
    logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits
    return logits
