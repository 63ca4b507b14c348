"""The ordinary loss of a language model: cross-entropy of the next token."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_qat.losses.base import RowLoss
from lightning_qat.losses.forms import Teacher
from lightning_qat.losses.logits import NO_LABEL


class LabelCrossEntropy(RowLoss):
    """Cross-entropy of labels, the mean over tokens that have one; no teacher is needed.

    Args:
        weight: Factor of this term in the sum of all.
    """

    name = "label_cross_entropy"
    needs_teacher = False
    needs_labels = True

    def row_sum(self, student: Tensor, teacher: Teacher | None, labels: Tensor | None) -> Tensor:
        """- sum of log q(label); rows labelled -100 add nothing."""
        assert labels is not None  # refused before
        return functional.cross_entropy(student, labels, ignore_index=NO_LABEL, reduction="sum")


def next_token_labels(input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The label at each token: the one after it.

    Args:
        input_ids: [batch, tokens].
        mask: As in :func:`~lightning_qat.losses.next_token_nll`: where a token is real, or, with one column less, where it is scored.

    Returns:
        int64 [batch, tokens]; -100 where the next token does not count, and at the end.
    """
    labels = torch.full_like(input_ids, NO_LABEL)
    following = input_ids[:, 1:]
    if mask is not None:
        keep = mask if mask.shape[1] < input_ids.shape[1] else mask[:, 1:] * mask[:, :-1]
        following = following.masked_fill(~keep.bool(), NO_LABEL)
    labels[:, :-1] = following
    return labels
