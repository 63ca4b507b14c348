"""Losses against a teacher of whom only the k most probable tokens are known, and the mass `tail` of all others.

All other tokens count as one, Q_tail is the student's mass on them, and per token

    CE = -sum_top p log q - tail log Q_tail          KL = CE - (-sum_top p log p - tail log tail)

What is left out is how mass is spread inside the tail. With p_bar and q_bar the two distributions given that the token is in the tail,

    CE_full - CE = tail H(p_bar, q_bar) >= 0         KL_full - KL = tail KL(p_bar || q_bar)     (the chain rule)
                                                                  <= tail eps^2 / 2

where eps is the largest |student's logit - teacher's logit - c| over the tail, for the best constant c: q_bar ~ p_bar exp(difference), so
KL(p_bar || q_bar) = log E exp(difference - mean difference) under p_bar, which Hoeffding's lemma bounds by (2 eps)^2 / 8.

    d CE / d logit_j = q_j - p_j in the top k,  q_j (1 - tail / Q_tail) elsewhere          (p and tail sum to 1)

The gradient is computed along with the loss, a chunk of tokens at a time in fp32 (or better): beside one gradient in the logits' dtype
nothing of the size of the logits is kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_qat.losses.logits import refuse_no_tokens, wide_dtype

CHUNKS = {"cpu": 2**19}  # elements; 2 MB in fp32 stay in a core's cache
OTHER_CHUNK = 2**25  # elsewhere, few large kernels


class TopK(NamedTuple):
    """What is known of the teacher's distribution over the next token.

    Attributes:
        ids: The most probable tokens, int64 [..., k]; no token twice.
        probabilities: Of each of them, float [..., k].
        tail: Of all others together, float [...]; 1 minus the sum of `probabilities`.
    """

    ids: Tensor
    probabilities: Tensor
    tail: Tensor


def sparse_soft_cross_entropy(student: Tensor, teacher: TopK, mask: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the student under what is known of the teacher's distribution.

    Args:
        student: Logits [batch, tokens, vocabulary].
        teacher: Its tensors begin with [batch, tokens].
        mask: 1 where a token counts, [batch, tokens]; None counts all.

    Returns:
        A scalar in nats per token; at most :func:`~lightning_qat.losses.soft_cross_entropy` of the whole distribution, and equal to it
        when k is the whole vocabulary.

    Raises:
        ValueError: Shapes differ, or no token counts.
    """
    rows, teacher = _counted(student, teacher, mask)
    return _SparseCrossEntropy.apply(student.flatten(0, -2), rows, *teacher)


def sparse_kl_divergence(student: Tensor, teacher: TopK, mask: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats per token after merging the tail: a lower bound of the true one (see the head of this file).

    Arguments are those of :func:`sparse_soft_cross_entropy`.
    """
    rows, teacher = _counted(student, teacher, mask)
    negative_entropy = torch.xlogy(teacher.probabilities, teacher.probabilities).sum(-1) + torch.xlogy(teacher.tail, teacher.tail)
    return _SparseCrossEntropy.apply(student.flatten(0, -2), rows, *teacher) + negative_entropy.mean()


def refuse_other_shapes(student: Tensor, teacher: TopK) -> None:
    """All of a teacher's tensors belong to the student's tokens."""
    shapes = [tuple(x.shape) for x in teacher]
    if not shapes[0] == shapes[1] == (*shapes[2], shapes[0][-1]) or shapes[2] != student.shape[:-1]:
        raise ValueError(
            f"loss: student logits {tuple(student.shape)}, teacher's ids {shapes[0]}, probabilities {shapes[1]}, tail {shapes[2]}; "
            "ids and probabilities must be [batch, tokens, k], the tail [batch, tokens]"
        )


def _counted(student: Tensor, teacher: TopK, mask: Tensor | None) -> tuple[Tensor, TopK]:
    """The rows of the flattened logits that count, and the teacher's distributions there in fp32 or better."""
    refuse_other_shapes(student, teacher)
    tokens = student.shape[:-1].numel()
    rows = torch.arange(tokens, device=student.device) if mask is None else mask.flatten().nonzero().squeeze(-1)
    refuse_no_tokens(len(rows))
    ids, probabilities, tail = (x.flatten(0, student.ndim - 2)[rows] for x in teacher)
    dtype = wide_dtype(student)
    return rows, TopK(ids, probabilities.to(dtype), tail.to(dtype))


class _SparseCrossEntropy(torch.autograd.Function):
    """Mean over `rows` of [tokens, vocabulary] logits; the distributions are those of the rows."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, rows: Tensor, ids: Tensor, probabilities: Tensor, tail: Tensor) -> Tensor:
        dtype, tail = wide_dtype(student), tail.unsqueeze(-1)
        # The gradient waits for its factor 1/n, or fp16 would underflow; what is divided later is a power of two, which rounds nothing.
        ctx.tokens = 2 ** len(rows).bit_length()
        unit = ctx.tokens / len(rows)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=dtype, device=student.device)
        size = max(1, CHUNKS.get(student.device.type, OTHER_CHUNK) // student.shape[-1])
        for row, i, p, t in zip(*(x.split(size) for x in (rows, ids, probabilities, tail)), strict=True):
            log_top, log_tail, inside = _log_probabilities(student.index_select(0, row).to(dtype), i)
            total -= (p * log_top).sum() + (t * log_tail).sum()
            if gradient is not None:
                mass = p.sum(-1, keepdim=True) + t
                inside.mul_(unit * (mass * log_tail.exp() - t)).scatter_(-1, i, unit * (mass * log_top.exp() - p))
                gradient.index_copy_(0, row, inside.to(gradient.dtype))
        ctx.save_for_backward(gradient)
        return total / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / ctx.tokens), None, None, None, None


def _log_probabilities(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the top tokens, [rows, k], and of the tail, [rows, 1], and the softmax inside the tail, [rows, V].

    Args:
        x: Logits [rows, V]; overwritten.
        ids: The top tokens, [rows, k].
    """
    top = x.gather(-1, ids)
    # A softmax of the tail alone: however little mass the student leaves there, its logarithm and its shape are exact. The mask is
    # finite, so that nothing is NaN where no token is in the tail.
    inside = torch.softmax(x.scatter_(-1, ids, torch.finfo(x.dtype).min), -1)
    tail = x.amax(-1, keepdim=True) - inside.amax(-1, keepdim=True).log()
    both = torch.logaddexp(torch.logsumexp(top, -1, keepdim=True), tail)
    return top - both, tail - both, inside
