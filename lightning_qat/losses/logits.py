"""Losses between the output distributions of teacher and student: LLM-QAT (arXiv 2305.17888), section 3.3.

    L = -(1/n) sum_i sum_c p_teacher(c | X_i) log p_student(c | X_i)        over the n tokens that are not padding

Departure from the reference code: it divides a sum over tokens by the batch size, so its loss and gradient grow with the sequence length.
Everything runs in fp32 (or better) on chunks of tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 2048  # tokens
NO_LABEL = -100  # what torch takes for "no label"


def wide_dtype(x: Tensor) -> torch.dtype:
    """What a loss of `x` is computed in: fp32 or better."""
    return torch.promote_types(x.dtype, torch.float32)


def refuse_no_tokens(tokens: int) -> None:
    """A mean over no tokens is no loss."""
    if tokens == 0:
        raise ValueError("loss: no token counts; the attention mask is 0 everywhere")


def refuse_other_shape(student: Tensor, teacher: Tensor) -> None:
    """Logits are compared one to one."""
    if student.shape != teacher.shape:
        raise ValueError(f"loss: student logits {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}; they must have one shape")


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


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
    total = student.new_zeros((), dtype=wide_dtype(student))
    for s, t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        total = total - (functional.softmax(_wide(t), -1) * functional.log_softmax(_wide(s), -1)).sum()
    return total / student.shape[0]


def kl_divergence(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats per token (arguments as in :func:`soft_cross_entropy`)."""
    student, teacher = _pair(student, teacher, mask)
    total = student.new_zeros((), dtype=wide_dtype(student))
    for s, t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        log_s, log_t = functional.log_softmax(_wide(s), -1), functional.log_softmax(_wide(t), -1)
        log_t = log_t.clamp(min=torch.finfo(log_t.dtype).min)  # a token that the teacher never writes adds 0, not 0 * inf
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total / student.shape[0]


def next_token_nll(logits: Tensor, input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each next token.

    Args:
        logits: [batch, tokens, vocabulary].
        input_ids: [batch, tokens]; position i is scored by the logits at i - 1.
        mask: 1 where a token is real, [batch, tokens]: a token counts when it and its predecessor are real. Or one column less, where
            neighbours may be strangers: 1 where position i is scored at i - 1, [batch, tokens - 1], from position 1 on.

    Returns:
        (sum in nats, number of tokens scored).
    """
    if mask is None:
        mask = torch.ones_like(input_ids[:, 1:])
    keep = (mask if mask.shape[1] < input_ids.shape[1] else mask[:, 1:] * mask[:, :-1]).bool()
    predictions, targets = logits[:, :-1][keep], input_ids[:, 1:][keep]
    total = logits.new_zeros((), dtype=torch.float64)
    for part, target in zip(predictions.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + functional.cross_entropy(_wide(part), target, reduction="sum").double()
    return total, keep.sum()


def _pair(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits of the tokens that count, [tokens, vocabulary] each."""
    refuse_other_shape(student, teacher)
    student, teacher = (x.flatten(0, -2) if mask is None else x[mask.bool()] for x in (student, teacher))
    refuse_no_tokens(student.shape[0])
    return student, teacher
