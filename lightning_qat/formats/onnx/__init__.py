"""ONNX: graphs with integer weights for onnxruntime and everything else that reads QuantizeLinear and DequantizeLinear.

    model.onnx          opset 21, or 25 where weights have two bits or fewer: weights as int2, int4 or int8 codes behind DequantizeLinear,
                        scales per tensor, channel or block; the settings for onnxruntime in its metadata
    model.onnx.data     the weights, where they are large

A transformers model also gets its config, generation config and tokenizer.
"""

from lightning_qat.formats.onnx.format import EXECUTES, OnnxFormat

__all__ = ["EXECUTES", "OnnxFormat"]
