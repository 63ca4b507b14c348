"""What distillation losses share: a weight, a name in logs, and for those of the output distribution one way to be summed."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_qat.losses.chunked import chunked_sums
from lightning_qat.losses.forms import Teacher, check_pair, select_rows
from lightning_qat.losses.logits import NO_LABEL, refuse_no_tokens, wide_dtype

ROW_ELEMENTS = {"cpu": 2**19}  # of logits at a time; 2 MB in fp32 stay in a core's cache
OTHER_ROW_ELEMENTS = 2**24  # elsewhere, few large kernels


class DistillationLoss(nn.Module):
    """One term of what a student is trained on.

    Args:
        weight: Factor of this term in the sum of all. Whoever adds them applies it, the loss itself does not.

    Attributes:
        name: The term's name in logs.

    Raises:
        ValueError: `weight` is negative or not finite.
    """

    name: str

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: {weight}; must be a finite number, 0 or more")
        self.weight = weight


class RowLoss(DistillationLoss, ABC):
    """A mean over tokens of something that is computed from the logits at one token.

    Subclasses say in `row_sum` what to add up. It runs on few rows at a time, in fp32 or better; of the size of the logits, one gradient in
    their dtype is kept.

    Attributes:
        needs_teacher: Whether the teacher's distribution is used.
        needs_labels: Whether labels are used; the mean is over the tokens that have one.
    """

    needs_teacher = True
    needs_labels = False

    @abstractmethod
    def row_sum(self, student: Tensor, teacher: Teacher | None, labels: Tensor | None) -> Tensor:
        """The differentiable sum over a few rows; arguments as in :meth:`total`, the student's logits in fp32 or better."""

    def total(self, student: Tensor, teacher: Teacher | None = None, labels: Tensor | None = None) -> Tensor:
        """Sum over rows, without `weight`.

        Args:
            student: Logits [rows, vocabulary].
            teacher: Logits of the same shape or :class:`~lightning_qat.losses.TopK` with rows first; None where no teacher is needed.
            labels: The token to predict at each row, int64 [rows]; -100 where there is none.

        Returns:
            A scalar in nats, fp32 or better.

        Raises:
            ValueError: Shapes differ, there is no row, or what the loss needs is None.
        """
        self._check(student, teacher, labels)

        def some(rows: slice, part: Tensor) -> Tensor:
            return self.row_sum(part.to(wide_dtype(part)), select_rows(teacher, rows), None if labels is None else labels[rows]).reshape(1)

        size = max(1, ROW_ELEMENTS.get(student.device.type, OTHER_ROW_ELEMENTS) // student.shape[-1])
        return chunked_sums(some, student, (), size)[0]

    def forward(self, student: Tensor, teacher: Teacher | None = None, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Mean over the tokens that count, without `weight`.

        Args:
            student: Logits [batch, tokens, vocabulary].
            teacher: As in :meth:`total`, beginning with [batch, tokens].
            mask: 1 where a token counts, [batch, tokens]; None counts all.
            labels: The token to predict at each, int64 [batch, tokens]; -100 where there is none.

        Returns:
            A scalar in nats per token.

        Raises:
            ValueError: Shapes differ, no token counts, or what the loss needs is None.
        """
        self._check(student, teacher, labels)
        counted = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask.bool()
        student, labels = student[counted], None if labels is None else labels[counted]
        refuse_no_tokens(student.shape[0])
        return self.total(student, select_rows(teacher, counted), labels) / self.tokens(student.shape[0], labels)

    def tokens(self, rows: int, labels: Tensor | None) -> int | Tensor:
        """Of how many rows the mean is taken: all, or those with a label (at least 1)."""
        if not self.needs_labels or labels is None:
            return rows
        return (labels != NO_LABEL).sum().clamp(min=1)

    def _check(self, student: Tensor, teacher: Teacher | None, labels: Tensor | None) -> None:
        if self.needs_teacher:
            if teacher is None:
                raise ValueError(f"{type(self).__name__}: teacher is None; it compares with a teacher's logits or its most probable tokens")
            check_pair(student, teacher)
        if self.needs_labels and (labels is None or labels.shape != student.shape[:-1]):
            got = "None" if labels is None else tuple(labels.shape)
            raise ValueError(
                f"{type(self).__name__}: labels {got}; must be int64 {tuple(student.shape[:-1])}, -100 where there is no label"
            )
