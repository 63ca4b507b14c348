"""Losses between the output distributions of teacher and student: LLM-QAT (arXiv 2305.17888), section 3.3.

    L = -(1/n) sum_i sum_c p_teacher(c | X_i) log p_student(c | X_i)        over the n tokens that are not padding

Departure from the reference code: it divides a sum over tokens by the batch size, so its loss and gradient grow with the sequence length.
Everything runs in fp32 (or better) on chunks of tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 2048  # tokens


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def soft_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the student under the teacher's distribution.

    Args:
        student: Logits [batch, tokens, vocabulary].
        teacher: Logits of the same shape.
        mask: 1 where a token counts, [batch, tokens]; None counts all.

    Returns:
        A scalar in nats per token.

    Raises:
        ValueError: Shapes differ, or no token counts.
    """
    student, teacher = _pair(student, teacher, mask)
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for s, t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        total = total - (functional.softmax(_wide(t), -1) * functional.log_softmax(_wide(s), -1)).sum()
    return total / student.shape[0]


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats per token (arguments as in :func:`soft_cross_entropy`)."""
    student, teacher = _pair(student, teacher, mask)
    total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
    for s, t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        log_s, log_t = functional.log_softmax(_wide(s), -1), functional.log_softmax(_wide(t), -1)
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total / student.shape[0]


def next_token_nll(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each next token.

    Args:
        logits: [batch, tokens, vocabulary].
        input_ids: [batch, tokens]; position i is scored by the logits at i - 1.
        mask: 1 where a token is real, [batch, tokens].

    Returns:
        (sum in nats, number of tokens scored); a token counts when it and its predecessor are real.
    """
    keep = torch.ones_like(input_ids[:, 1:], dtype=torch.bool) if mask is None else (mask[:, 1:] * mask[:, :-1]).bool()
    predictions, targets = logits[:, :-1][keep], input_ids[:, 1:][keep]
    total = logits.new_zeros((), dtype=torch.float64)
    for part, target in zip(predictions.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + functional.cross_entropy(_wide(part), target, reduction="sum").double()
    return total, keep.sum()


def _pair(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits of the tokens that count, [tokens, vocabulary] each."""
    if student.shape != teacher.shape:
        raise ValueError(f"loss: student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}; they must have one shape")
    student, teacher = (x.flatten(0, -2) if mask is None else x[mask.bool()] for x in (student, teacher))
    if student.shape[0] == 0:
        raise ValueError("loss: no token counts; the attention mask is 0 everywhere")
    return student, teacher


class SoftCrossEntropy(nn.Module):
    """:func:`soft_cross_entropy` as a module, the default of ``DistillationModule(loss=...)``."""

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean over the tokens that count."""
        return soft_cross_entropy(student, teacher, mask)
