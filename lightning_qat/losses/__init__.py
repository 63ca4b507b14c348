"""Distillation losses, one family to a file."""

from lightning_qat.losses.base import DistillationLoss, RowLoss
from lightning_qat.losses.chunked import chunked_sums
from lightning_qat.losses.divergences import DivergenceLoss, ForwardKL, JensenShannon, ReverseKL, SoftCrossEntropy
from lightning_qat.losses.forms import divergence, most_probable
from lightning_qat.losses.labels import LabelCrossEntropy, next_token_labels
from lightning_qat.losses.layers import AttentionLoss, HiddenStateLoss, LayerLoss
from lightning_qat.losses.logits import kl_divergence, next_token_nll, soft_cross_entropy
from lightning_qat.losses.rows import row_sums
from lightning_qat.losses.sparse import TopK, sparse_kl_divergence, sparse_soft_cross_entropy

__all__ = [
    "AttentionLoss",
    "DistillationLoss",
    "DivergenceLoss",
    "ForwardKL",
    "HiddenStateLoss",
    "JensenShannon",
    "LabelCrossEntropy",
    "LayerLoss",
    "ReverseKL",
    "RowLoss",
    "SoftCrossEntropy",
    "TopK",
    "chunked_sums",
    "divergence",
    "kl_divergence",
    "most_probable",
    "next_token_labels",
    "next_token_nll",
    "row_sums",
    "soft_cross_entropy",
    "sparse_kl_divergence",
    "sparse_soft_cross_entropy",
]
