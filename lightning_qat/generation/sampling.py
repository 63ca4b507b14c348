"""Drawing tokens: the softmax is computed once per step, for the draw, for the likelihood of what was drawn and for the targets kept."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WIDTH = 128  # tokens summed at once: a draw looks for its stretch of the vocabulary, then inside it


@dataclass(frozen=True)
class Softmax:
    """An unnormalised softmax.

    Attributes:
        exps: exp(logits - largest logit), [rows, vocabulary filled up with zeros to a multiple of `WIDTH`], float32 or float64.
        sums: Sum of each stretch of `WIDTH`, [rows, stretches].
        total: Sum of all, [rows]; not finite where a logit is NaN or inf.
    """

    exps: Tensor
    sums: Tensor
    total: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> "Softmax":
        """From logits [rows, vocabulary] of any float dtype."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1.0:
            wide = wide / temperature
        exps, missing = (wide - wide.amax(-1, keepdim=True)).exp_(), -wide.shape[-1] % WIDTH
        return cls.of_exps(functional.pad(exps, (0, missing)) if missing else exps)

    @classmethod
    def of_exps(cls, exps: Tensor) -> "Softmax":
        """From the exponentials."""
        sums = exps.view(exps.shape[0], -1, WIDTH).sum(-1)
        return cls(exps, sums, sums.sum(-1))

    def kept(self, top_k: int, top_p: float) -> "Softmax":
        """Without the tokens that `top_k` or `top_p` leave out; tokens as probable as the last one kept are kept too."""
        if top_k == 0 and top_p == 1:
            return self
        ordered = self.exps.topk(min(top_k, self.exps.shape[-1]) if top_k else self.exps.shape[-1], dim=-1).values
        before = ordered.cumsum(-1) - ordered
        last = (before < top_p * ordered.sum(-1, keepdim=True)).sum(-1, keepdim=True) - 1
        return Softmax.of_exps(self.exps.masked_fill(self.exps < ordered.gather(-1, last.clamp(min=0)), 0))

    def draw(self, uniform: Tensor) -> Tensor:
        """Inverse-CDF sampling.

        Args:
            uniform: Numbers in [0, 1), [rows].

        Returns:
            Token ids, [rows]; never one whose probability is 0.
        """
        ends = self.sums.cumsum(-1)
        total = ends[:, -1]
        # Strictly below the total, so that a stretch is found even where the product rounds up to it.
        target = torch.minimum(uniform.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(-1)
        stretch = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[-1] - 1)
        inside = self.exps.view(*self.sums.shape, WIDTH).gather(1, stretch.unsqueeze(-1).expand(-1, 1, WIDTH)).squeeze(1)
        reached = ends.gather(-1, stretch) - self.sums.gather(-1, stretch)
        found = torch.searchsorted(inside.cumsum(-1).add_(reached), target, right=True)
        # The two sums may round differently; past the end means the last token that has a probability.
        last = torch.where(inside > 0, torch.arange(WIDTH, device=inside.device), 0).amax(-1, keepdim=True)
        return (stretch * WIDTH + torch.minimum(found, last)).squeeze(-1)

    def nll(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood in nats of `tokens` [rows], float64 [rows]."""
        return self.total.double().log() - self.exps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double().log()
