"""Distillation losses, one family to a file."""

from lightning_qat.losses.forms import SoftCrossEntropy, divergence, most_probable
from lightning_qat.losses.logits import kl_divergence, next_token_nll, soft_cross_entropy
from lightning_qat.losses.sparse import TopK, sparse_kl_divergence, sparse_soft_cross_entropy

__all__ = [
    "SoftCrossEntropy",
    "TopK",
    "divergence",
    "kl_divergence",
    "most_probable",
    "next_token_nll",
    "soft_cross_entropy",
    "sparse_kl_divergence",
    "sparse_soft_cross_entropy",
]
