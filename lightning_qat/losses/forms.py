"""The teacher's distribution in either of its forms, logits or the most probable tokens: here and nowhere else they are told apart."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_qat.losses.logits import kl_divergence, refuse_other_shape, wide_dtype
from lightning_qat.losses.sparse import TopK, refuse_other_shapes, sparse_kl_divergence

Teacher = Tensor | TopK


def divergence(student: Tensor, teacher: Teacher, mask: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats per token; of the most probable tokens, a lower bound of it."""
    if isinstance(teacher, TopK):
        return sparse_kl_divergence(student, teacher, mask)
    return kl_divergence(student, teacher, mask)


def most_probable(teacher: Teacher) -> Tensor:
    """The teacher's most probable token, [batch, tokens]."""
    return teacher.ids[..., 0] if isinstance(teacher, TopK) else teacher.argmax(-1)


def select_rows(teacher: Teacher | None, where: slice | Tensor) -> Teacher | None:
    """A teacher at some of its tokens."""
    if isinstance(teacher, TopK):
        return TopK(*(x[where] for x in teacher))
    return None if teacher is None else teacher[where]


def check_pair(student: Tensor, teacher: Teacher) -> None:
    """Refuse shapes that do not belong together."""
    if isinstance(teacher, TopK):
        refuse_other_shapes(student, teacher)
    else:
        refuse_other_shape(student, teacher)


def log_distributions(student: Tensor, teacher: Teacher, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over the same categories: the tokens, or the top k and all others as one.

    No value is below the smallest finite number: 0 times it is 0, where 0 times -inf would be NaN.

    Args:
        student: Logits [rows, vocabulary], fp32 or better.
        teacher: Logits of the same shape, or the most probable tokens.
        temperature: Divides both logits.

    Returns:
        (teacher's, which gets no gradient, student's), [rows, vocabulary] or [rows, k + 1].

    Raises:
        ValueError: A temperature other than 1 and the most probable tokens only.
    """
    if not isinstance(teacher, TopK):
        pair = (functional.log_softmax(x.to(wide_dtype(student)) / temperature, -1) for x in (teacher, student))
        log_p, log_q = (x.clamp(min=torch.finfo(x.dtype).min) for x in pair)
        return log_p.detach(), log_q
    if temperature != 1:
        raise ValueError(
            f"temperature: {temperature}, but only the teacher's most probable tokens are known; "
            "tokens merged into a tail cannot be tempered. Use temperature 1, or a teacher in memory"
        )
    limits = torch.finfo(student.dtype)
    p = torch.cat([teacher.probabilities, teacher.tail.unsqueeze(-1)], -1).to(student.dtype)
    # A softmax over (top, all others): however little mass is left to the others, its logarithm is exact.
    others = student.scatter(-1, teacher.ids, limits.min).logsumexp(-1, keepdim=True)
    log_q = functional.log_softmax(torch.cat([student.gather(-1, teacher.ids), others], -1), -1)
    # A probability may have been rounded to 0 when it was kept. Reverse divergences would be infinite; exp of this floor is still 0.
    return p.log().clamp(min=2 * math.log(limits.tiny)).detach(), log_q.clamp(min=limits.min)
