"""Quantized embedding: one row is one channel, so the looked-up rows are quantized instead of the whole table."""

from torch import Tensor, nn
from torch.nn import functional

from lightning_qat.modules.layer import QuantLayer, register_layer
from lightning_qat.modules.packed import PackedWeight
from lightning_qat.quantizers import Quantizer


@register_layer(nn.Embedding)
class QuantEmbedding(QuantLayer, nn.Embedding):
    """fq(W)[ids]; ids of any shape, W [vocabulary, features]."""

    input_granularities = ()

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Renormalising rows in the forward pass writes to the weight."""
        return "Embedding with max_norm changes its weight in the forward pass" if getattr(module, "max_norm", None) else None

    def forward(self, input: Tensor) -> Tensor:
        """Shape [...] -> [..., features]."""
        quantizer = self.weight_quantizer
        rows_alone = isinstance(quantizer, Quantizer) and quantizer.spec.granularity != "tensor" and quantizer.kept_scale is None
        if isinstance(quantizer, Quantizer) and rows_alone and self.keeps == "nothing":
            return quantizer(self._look_up(input, self.weight))
        return self._look_up(input, self.quantized_weight())

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        packed = isinstance(self.weight_quantizer, PackedWeight)
        padding = None if packed else self.padding_idx
        return functional.embedding(ids, weight, padding, None, 2.0, self.scale_grad_by_freq, self.sparse)
