"""The torchao format: our codes as torchao's `IntxUnpackedToInt8Tensor`, for transformers, `torch.export` and ExecuTorch.

    model.safetensors    <layer>._weight_qdata        int8 [out, in]: one code a byte, whatever its bits
                         <layer>._weight_scale        [out, groups], in the scheme's scale dtype
                         <layer>._weight_zero_point   int8 [out, groups]; zeros on symmetric grids
                         every other parameter and buffer under its own name and dtype
    config.json          a `TorchAoConfig` that describes them, for models of transformers

Names and metadata are those of torchao's own flattening, so `from_pretrained` reads the folder without this library.
"""

from lightning_qat.formats.torchao.format import TorchaoFormat
from lightning_qat.formats.torchao.program import export_program

__all__ = ["TorchaoFormat", "export_program"]
