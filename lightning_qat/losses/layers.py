"""Losses between what is inside teacher and student, layer by layer: hidden states and attention, as in KDLSQ-BERT (arXiv 2101.05938).

    L = sum over pairs of layers of mean (student - teacher)^2        the mean over real tokens and features

KDLSQ-BERT takes the attention scores before the softmax. Models of transformers return the probabilities after it, and so do we.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from lightning_qat.losses.base import DistillationLoss
from lightning_qat.losses.logits import refuse_no_tokens, wide_dtype

HiddenMetric = Literal["mse", "normalized_mse", "cosine"]
AttentionMetric = Literal["mse", "kl"]


class LayerLoss(DistillationLoss, ABC):
    """A sum over pairs of layers, one of the student and one of the teacher.

    Blocks are paired evenly by default: block j of S in the student with block ceil(j T / S) of T in the teacher, both counted from 1, so
    the last goes with the last, and at equal depth each with its own.

    Args:
        layers: Student's layer to teacher's layer, places in the sequences that are given; None pairs all evenly.
        weight: Factor of this term in the sum of all.

    Attributes:
        needs: What the models must return, in the names of transformers.

    Raises:
        ValueError: `layers` is empty or holds a negative place.
    """

    needs: Literal["hidden_states", "attentions"]

    def __init__(self, layers: Mapping[int, int] | None = None, weight: float = 1.0) -> None:
        super().__init__(weight)
        if layers is not None and (not layers or min(*layers.keys(), *layers.values()) < 0):
            raise ValueError(f"layers: {dict(layers)}; must map the student's layers to the teacher's, counted from 0, or be None for all")
        self.layers = None if layers is None else dict(layers)

    @abstractmethod
    def pair(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """The loss of one pair of layers, a mean; `mask` is bool [batch, tokens]."""

    @abstractmethod
    def even_map(self, student: int, teacher: int) -> dict[int, int]:
        """Which places go together in sequences of these lengths."""

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Sum over the pairs, each a mean over what is real; without `weight`.

        Args:
            student: One tensor per layer, as models of transformers return them.
            teacher: The same of the teacher; it needs no gradient.
            mask: 1 where a token is real, [batch, tokens]; None counts all.

        Returns:
            A scalar, fp32 or better.

        Raises:
            ValueError: A layer is missing, shapes differ, or no token counts.
        """
        for whose, found in (("student", student), ("teacher", teacher)):
            if not found or any(x is None for x in found):
                raise ValueError(
                    f'{type(self).__name__}: the {whose} returned no {self.needs}; load it with attn_implementation="eager" for attentions'
                )
        first = student[0]
        counted = torch.ones(first.shape[0], first.shape[-2], device=first.device) if mask is None else mask
        counted = counted.bool()
        refuse_no_tokens(int(counted.sum()))
        pairs = self.even_map(len(student), len(teacher)) if self.layers is None else self.layers
        losses = []
        for own, other in pairs.items():
            if own >= len(student) or other >= len(teacher):
                raise ValueError(
                    f"layers: {own} to {other}; the student has {self.needs} 0 to {len(student) - 1}, the teacher 0 to {len(teacher) - 1}"
                )
            losses.append(self.pair(student[own], teacher[other].detach(), counted))
        return torch.stack(losses).sum()


class HiddenStateLoss(LayerLoss):
    """Distance between hidden states, the output of the embedding (place 0) and of each block (places 1, 2, ...).

    Most models of transformers return the last block's output after the final norm.

    Args:
        layers: Student's place to teacher's place; None pairs embedding with embedding and the blocks evenly.
        metric: Mean over real tokens of: ``mse``, the mean over features of (student - teacher)^2; ``normalized_mse``, that over the
            mean over features of teacher^2, which forgets how large each layer's and each token's states are; ``cosine``, 1 - their cosine.
        weight: Factor of this term in the sum of all.

    Raises:
        ValueError: Unknown metric, or `layers` is empty or holds a negative place.
    """

    name = "hidden_states"
    needs = "hidden_states"

    def __init__(self, layers: dict[int, int] | None = None, metric: HiddenMetric = "mse", weight: float = 1.0) -> None:
        super().__init__(layers, weight)
        self.metric = _known(metric, get_args(HiddenMetric))

    def even_map(self, student: int, teacher: int) -> dict[int, int]:
        """Place 0 to place 0, and block j to block ceil(j T / S)."""
        return {0: 0} | {own + 1: other + 1 for own, other in _even_blocks(student - 1, teacher - 1).items()}

    def pair(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """One pair of [batch, tokens, features]."""
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"HiddenStateLoss: the student's hidden states have {student.shape[-1]} features, the teacher's {teacher.shape[-1]}; "
                "they can only be compared at the same width; use losses of the logits"
            )
        own, other = (x[mask].to(wide_dtype(x)) for x in (student, teacher))
        if self.metric == "cosine":
            return (1 - functional.cosine_similarity(own, other, dim=-1)).mean()
        error = (own - other).square().mean(-1)
        if self.metric == "normalized_mse":
            error = error / other.square().mean(-1).clamp(min=torch.finfo(other.dtype).tiny)
        return error.mean()


class AttentionLoss(LayerLoss):
    """Distance between attention probabilities [batch, heads, tokens, tokens] of blocks 0, 1, ...; only real queries and keys count.

    Args:
        layers: Student's block to teacher's block; None pairs them evenly.
        metric: ``mse``, mean over heads, real queries and real keys of (student - teacher)^2, the keys that a causal mask hides among
            them; ``kl``, mean over heads and real queries of KL(teacher || student) in nats, where a student's probability below the
            smallest normal number of its dtype counts as that number.
        weight: Factor of this term in the sum of all.

    Raises:
        ValueError: Unknown metric, or `layers` is empty or holds a negative place.
    """

    name = "attentions"
    needs = "attentions"

    def __init__(self, layers: dict[int, int] | None = None, metric: AttentionMetric = "mse", weight: float = 1.0) -> None:
        super().__init__(layers, weight)
        self.metric = _known(metric, get_args(AttentionMetric))

    def even_map(self, student: int, teacher: int) -> dict[int, int]:
        """Block j to block ceil(j T / S), counted from 1."""
        return _even_blocks(student, teacher)

    def pair(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """One pair of [batch, heads, tokens, tokens]."""
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"AttentionLoss: the student has {student.shape[1]} heads, the teacher {teacher.shape[1]}; "
                "their attention can only be compared head by head; use losses of hidden states or logits"
            )
        queries, keys = mask[:, None, :, None], mask[:, None, None, :]
        own, other = (torch.where(queries & keys, x, 0).to(wide_dtype(x)) for x in (student, teacher))
        heads, lengths = student.shape[1], mask.sum(-1)
        if self.metric == "mse":
            return (own - other).square().sum() / (heads * lengths.square().sum())
        floor = torch.finfo(student.dtype).tiny
        return (torch.xlogy(other, other) - other * own.clamp(min=floor).log()).sum() / (heads * lengths.sum())


def _even_blocks(student: int, teacher: int) -> dict[int, int]:
    """From 0: block j of `student` to block ceil(j teacher / student) of `teacher`, both counted from 1."""
    return {j - 1: -(-j * teacher // student) - 1 for j in range(1, student + 1)}


def _known(metric: str, allowed: tuple[str, ...]) -> str:
    if metric not in allowed:
        raise ValueError(f"metric: {metric!r}; must be one of {', '.join(allowed)}")
    return metric
