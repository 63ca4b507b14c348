"""From packed codes back to weights that train: each weight lies on its grid, and a fake quantizer stands where the codes were.

A quantizer that looks for ranges would find others than those that were stored wherever the largest weight of a block does not lie at the
end of its grid: with percentiles, searched ranges, asymmetric grids, `half_range` and the mean-|w| levels. So it keeps the stored scales.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_qat.modules.packed import PackedWeight, packed_weights
from lightning_qat.modules.weights import LayerWeight, layer_weights
from lightning_qat.numerics.grid import QuantizedTensor
from lightning_qat.quantizers import Quantizer, build_quantizer

Scales = Literal["kept", "found"]


def make_trainable(model: nn.Module, scales: Scales = "kept") -> nn.Module:
    """Turn packed weights into parameters under fake quantizers, in place.

    Args:
        model: A model with packed weights; tied ones are tied again.
        scales: ``kept``: stored scales and zero points stand still, so the first forward pass has the same codes on every grid, and so has
            an export of it. Weights train between the levels and do not leave the range (the ``mask`` estimator). ``found``: ranges are
            found anew in each step, as in quantization-aware training from a float model. That begins with the same codes only on narrow
            symmetric min-max grids with ``divisor="qmax"``, and there only where the largest code of every block is used.

    Returns:
        The same model, in training mode.

    Raises:
        ValueError: No packed weights, another word for `scales`, or one parameter that two different grids were stored for.
    """
    if scales not in ("kept", "found"):
        raise ValueError(f"scales: got {scales!r}, expected 'kept' or 'found'")
    if not packed_weights(model):
        raise ValueError(f"make_trainable: {type(model).__name__} holds no packed codes; only what load_quantized returns does")
    stored: dict[str, QuantizedTensor] = {}
    parameters: dict[nn.Parameter, nn.Parameter] = {}  # what stood in for a weight, which layers may share -> the weight
    for weight in layer_weights(model):
        packed = weight.quantizer
        if isinstance(packed, PackedWeight):
            stored[weight.name] = packed.codes()
            _unpack(weight, packed, stored[weight.name], parameters, scales)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    if scales == "kept":
        _check_codes(model, stored)
    return model.train()


def _unpack(
    weight: LayerWeight, packed: PackedWeight, quantized: QuantizedTensor, parameters: dict[nn.Parameter, nn.Parameter], scales: Scales
) -> None:
    layer, placeholder = weight.layer, getattr(weight.layer, weight.parameter)
    quantizer, matrix = build_quantizer(packed.spec), quantized.dequantize().to(placeholder.dtype)
    if scales == "kept":
        quantizer.keep_scale(quantized.scale, quantized.zero_point)
        matrix = values_of(quantized.codes, matrix, quantizer)
    if placeholder not in parameters:
        parameters[placeholder] = nn.Parameter(layer.from_matrix(matrix).contiguous())
    setattr(layer, f"{weight.parameter}_quantizer", quantizer)
    setattr(layer, weight.parameter, parameters[placeholder])
    layer.kept_weight = None


def values_of(codes: Tensor, values: Tensor, quantizer: Quantizer) -> Tensor:
    """Values whose codes are the given ones.

    In bfloat16 a value of more than 7 bits may be rounded over the border to the next code; then a neighbour of it has the right one.

    Args:
        codes: Shape of `values`.
        values: What the codes stand for, rounded to the dtype that is wanted.
        quantizer: With the scales of the codes.
    """
    for end in (torch.inf, -torch.inf):
        wrong = quantizer.codes(values).codes != codes
        if not bool(wrong.any()):
            return values
        neighbour = torch.nextafter(values, torch.full_like(values, end))
        values = torch.where(wrong & (quantizer.codes(neighbour).codes == codes), neighbour, values)
    return values


def _check_codes(model: nn.Module, stored: dict[str, QuantizedTensor]) -> None:
    """A promise that is cheap to look at: one pass over the weights."""
    for weight in layer_weights(model):
        if weight.name in stored and not torch.equal(weight.codes().codes, stored[weight.name].codes):
            raise ValueError(
                f"{weight.name}: its values in {getattr(weight.layer, weight.parameter).dtype} do not have the stored codes: it shares its "
                "weight with a layer of another grid, or the dtype is too coarse; go on from the training checkpoint"
            )
