"""Distillation losses, one family to a file."""

from lightning_qat.losses.logits import SoftCrossEntropy, kl_divergence, next_token_nll, soft_cross_entropy

__all__ = ["SoftCrossEntropy", "kl_divergence", "next_token_nll", "soft_cross_entropy"]
