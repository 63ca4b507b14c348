"""The teacher's distribution in either of its forms, logits or the most probable tokens: here and nowhere else they are told apart."""

from torch import Tensor, nn

from lightning_qat.losses.logits import kl_divergence, soft_cross_entropy
from lightning_qat.losses.sparse import TopK, sparse_kl_divergence, sparse_soft_cross_entropy


class SoftCrossEntropy(nn.Module):
    """:func:`~lightning_qat.losses.soft_cross_entropy` as a module, the default of ``DistillationModule(loss=...)``."""

    def forward(self, student: Tensor, teacher: Tensor | TopK, mask: Tensor | None = None) -> Tensor:
        """Mean over the tokens that count."""
        if isinstance(teacher, TopK):
            return sparse_soft_cross_entropy(student, teacher, mask)
        return soft_cross_entropy(student, teacher, mask)


def divergence(student: Tensor, teacher: Tensor | TopK, mask: Tensor | None = None) -> Tensor:
    """Mean KL(teacher || student) in nats per token; of the most probable tokens, a lower bound of it."""
    if isinstance(teacher, TopK):
        return sparse_kl_divergence(student, teacher, mask)
    return kl_divergence(student, teacher, mask)


def most_probable(teacher: Tensor | TopK) -> Tensor:
    """The teacher's most probable token, [batch, tokens]."""
    return teacher.ids[..., 0] if isinstance(teacher, TopK) else teacher.argmax(-1)
