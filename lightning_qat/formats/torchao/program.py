"""A `torch.export` program of a model with torchao tensors: what ExecuTorch and other compilers of graphs start from."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from lightning_qat.formats.exactness.executed import example_for


def export_program(model: nn.Module, example_inputs: Any = None, dynamic_shapes: Mapping[str, Any] | None = None) -> ExportedProgram:
    """The graph of a model, with the trained codes as int8 parameters.

    Weights appear as `torchao.dequantize_affine` of codes, scales and zero points; quantized inputs as `choose_qparams_affine`,
    `quantize_affine` and `dequantize_affine`, the pattern that ExecuTorch's partitioners look for.

    Args:
        model: What :func:`~lightning_qat.load_quantized` returned for a ``torchao`` export; it stays as it is.
        example_inputs: What its forward takes: a tensor, a tuple, or keyword arguments; None for random tokens of a language model.
        dynamic_shapes: For names of arguments which of their axes may change, as :func:`torch.export.export` takes them; None of the
            others may.

    Returns:
        The program. It takes keyword arguments, and a language model has no cache in it. `torch.export.save` writes it.

    Raises:
        ValueError: The model holds no torchao tensors, or its inputs are not known.
    """
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.utils import unwrap_tensor_subclass

    if not any(isinstance(parameter, IntxUnpackedToInt8Tensor) for parameter in model.parameters()):
        raise ValueError("export_program: the model holds no torchao tensors; pass what load_quantized returns for a 'torchao' export")
    example = example_for(model, example_inputs)
    if example is None:
        raise ValueError("example_inputs: what this model takes is not known; pass a tensor, a tuple, or keyword arguments")
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(copied, PreTrainedModel) and copied.can_generate():
        copied.config.use_cache = False
    unwrap_tensor_subclass(copied)  # else the file of the program would hold pickled tensors instead of plain int8 ones
    shapes = None if dynamic_shapes is None else {name: dynamic_shapes.get(name) for name in example}
    return torch.export.export(copied, (), dict(example), dynamic_shapes=shapes, strict=False)
