"""Losses between the next-token distributions of teacher p and student q, tempered by T: softmax(logits / T).

    SoftCrossEntropy   T^2  -sum p log q
    ForwardKL          T^2  KL(p || q) = T^2 sum p (log p - log q)                          the same gradient as SoftCrossEntropy
    ReverseKL          T^2  KL(q || p)                                                      as in MiniLLM (arXiv 2306.08543)
    JensenShannon      T^2  (beta KL(p || m) + (1 - beta) KL(q || m)), m = beta p + (1 - beta) q      GKD (arXiv 2306.13649)

T^2 keeps gradients of one size whatever T is: those of the tempered distributions shrink as 1 / T^2 (Hinton et al., arXiv 1503.02531).
Where only the most probable tokens of the teacher are known, all others are one category (see sparse.py) and T must be 1.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from lightning_qat.losses.base import RowLoss
from lightning_qat.losses.forms import Teacher, log_distributions
from lightning_qat.losses.logits import soft_cross_entropy
from lightning_qat.losses.sparse import TopK, sparse_soft_cross_entropy


class DivergenceLoss(RowLoss):
    """A loss of teacher's and student's distributions, times T^2.

    Args:
        temperature: T, divides both logits; must be 1 where only the teacher's most probable tokens are known.
        weight: Factor of this term in the sum of all.

    Raises:
        ValueError: `temperature` is not a positive finite number, or `weight` is negative or not finite.
    """

    def __init__(self, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: {temperature}; must be a finite number above 0")
        self.temperature = temperature

    def row_sum(self, student: Tensor, teacher: Teacher | None, labels: Tensor | None) -> Tensor:
        """T^2 times the sum over rows."""
        assert teacher is not None  # refused before
        return self.temperature**2 * self.between(*log_distributions(student, teacher, self.temperature))

    @abstractmethod
    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Sum over rows of log-probabilities, of the teacher and of the student, [rows, categories]; all are finite."""


class SoftCrossEntropy(DivergenceLoss):
    """Cross-entropy of the student under the teacher's distribution, the loss of LLM-QAT and the default of ``DistillationModule``.

    At temperature 1 the mean is :func:`~lightning_qat.losses.soft_cross_entropy`.

    Args:
        temperature: T, divides both logits; must be 1 where only the teacher's most probable tokens are known.
        weight: Factor of this term in the sum of all.
    """

    name = "soft_cross_entropy"

    def row_sum(self, student: Tensor, teacher: Teacher | None, labels: Tensor | None) -> Tensor:
        """T^2 times the sum over rows; of the most probable tokens by the function whose gradient costs no second pass over the logits."""
        if isinstance(teacher, TopK) and self.temperature == 1:
            return sparse_soft_cross_entropy(student, teacher) * student.shape[0]
        return super().row_sum(student, teacher, labels)

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """- sum p log q."""
        return -(log_p.exp() * log_q).sum()

    def forward(self, student: Tensor, teacher: Teacher | None = None, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Mean over the tokens that count."""
        if teacher is None or self.temperature != 1:
            return super().forward(student, teacher, mask, labels)
        if isinstance(teacher, TopK):
            return sparse_soft_cross_entropy(student, teacher, mask)
        return soft_cross_entropy(student, teacher, mask)


class ForwardKL(DivergenceLoss):
    """KL(teacher || student); its gradient is that of :class:`SoftCrossEntropy`, its value is 0 for a perfect student.

    Args:
        temperature: T, divides both logits; must be 1 where only the teacher's most probable tokens are known.
        weight: Factor of this term in the sum of all.
    """

    name = "forward_kl"

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Sum of p (log p - log q)."""
        return _kl(log_p, log_q)


class ReverseKL(DivergenceLoss):
    """KL(student || teacher): the student keeps to what the teacher would write. Where the teacher's logit is -inf it is infinite.

    Args:
        temperature: T, divides both logits; must be 1 where only the teacher's most probable tokens are known.
        weight: Factor of this term in the sum of all.
    """

    name = "reverse_kl"

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Sum of q (log q - log p)."""
        return _kl(log_q, log_p)


class JensenShannon(DivergenceLoss):
    """Generalised Jensen-Shannon divergence, between 0 and the entropy of (beta, 1 - beta), ln 2 at one half.

    Args:
        beta: The teacher's share of the mixture, between 0 and 1. Divided by beta it tends to the forward KL as beta goes to 0, and divided
            by 1 - beta to the reverse KL as beta goes to 1.
        temperature: T, divides both logits; must be 1 where only the teacher's most probable tokens are known.
        weight: Factor of this term in the sum of all.

    Raises:
        ValueError: `beta` is not inside 0 .. 1.
    """

    name = "jensen_shannon"

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(temperature, weight)
        if not 0 < beta < 1:
            raise ValueError(f"beta: {beta}; must be above 0 and below 1; the ends are ForwardKL and ReverseKL")
        self.beta = beta

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Divergences of both from their mixture."""
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log(1 - self.beta))
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()
