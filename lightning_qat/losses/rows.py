"""Several losses and metrics of the same logits, as the function that :func:`~lightning_qat.losses.chunked_sums` sums over chunks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_qat.losses.base import RowLoss
from lightning_qat.losses.chunked import RowFunction
from lightning_qat.losses.divergences import ForwardKL
from lightning_qat.losses.forms import Teacher, most_probable
from lightning_qat.losses.labels import LabelCrossEntropy
from lightning_qat.losses.logits import wide_dtype

METRICS = ("kl", "top1", "nll")


def row_sums(
    losses: Sequence[RowLoss],
    head: Callable[[Tensor], Tensor],
    teacher: Callable[[slice], Teacher] | None = None,
    labels: Tensor | None = None,
    metrics: Sequence[str] = (),
) -> RowFunction:
    """What one chunk of rows adds.

    Args:
        losses: Any number; without one, only metrics are computed.
        head: From the student's final hidden states [c, d] to logits [c, vocabulary], with all that the model does there (softcap, scale).
        teacher: From a slice of the rows to the teacher's distributions there: its head on kept hidden states, kept logits or ``TopK``.
            Called once per chunk, without gradients.
        labels: The token to predict at each row, int64 [rows]; -100 where there is none.
        metrics: Any of ``kl``, the sum of KL(teacher || student) in nats; ``top1``, at how many rows both have the same most probable
            token; ``nll``, the sum in nats over the rows that have a label.

    Returns:
        A function for :func:`~lightning_qat.losses.chunked_sums` of 1 + len(losses) + len(metrics) sums. The first is the weighted sum of
        the losses, then comes each loss without weight, then the metrics in the order asked for. Losses are so scaled that division by the
        number of rows gives their means, whatever rows have labels.

    Raises:
        ValueError: Neither losses nor metrics; an unknown metric; a loss or a metric needs what is None.
    """
    _check(losses, teacher, labels, metrics)
    shares = [1.0 if labels is None else len(labels) / loss.tokens(len(labels), labels) for loss in losses]

    def sums(rows: slice, hidden: Tensor) -> Tensor:
        logits, target = head(hidden), None
        with torch.no_grad():
            if teacher is not None:
                target = teacher(rows)
            own = None if labels is None else labels[rows]
            # Before the losses: what metrics need is gone when the losses' graph is largest.
            measured = [_measure(name, logits.detach(), target, own) for name in metrics]
        totals = [loss.total(logits, target, own) * share for loss, share in zip(losses, shares, strict=True)]
        none = torch.zeros((), dtype=wide_dtype(logits), device=logits.device)
        weighted = sum((loss.weight * total for loss, total in zip(losses, totals, strict=True)), none)
        return torch.stack([weighted, *(total.detach() for total in totals), *(value.to(weighted.dtype) for value in measured)])

    return sums


def _check(losses: Sequence[RowLoss], teacher: object, labels: object, metrics: Sequence[str]) -> None:
    if not losses and not metrics:
        raise ValueError("losses: empty, and no metrics; pass at least one, such as SoftCrossEntropy()")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics: {unknown[0]!r}; must be of {', '.join(METRICS)}")
    needs_teacher = [loss.name for loss in losses if loss.needs_teacher] + [name for name in metrics if name != "nll"]
    needs_labels = [loss.name for loss in losses if loss.needs_labels] + [name for name in metrics if name == "nll"]
    if teacher is None and needs_teacher:
        raise ValueError(f"teacher: None, but {needs_teacher[0]} compares with its distributions")
    if labels is None and needs_labels:
        raise ValueError(f"labels: None, but {needs_labels[0]} needs the token to predict at each row")


def _measure(name: str, logits: Tensor, teacher: Teacher | None, labels: Tensor | None) -> Tensor:
    if name == "nll":
        return LabelCrossEntropy().total(logits, None, labels)
    assert teacher is not None  # refused before
    if name == "kl":
        return ForwardKL().total(logits, teacher)
    return (logits.argmax(-1) == most_probable(teacher)).sum()
