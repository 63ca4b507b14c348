"""compressed-tensors, as transformers loads and runs it: our codes and scales in the library's own layout.

    config.json           quantization_config: groups of layers that share a scheme, each with its own storage format
    model.safetensors     <layer>.weight_packed   int32 [out, words]: codes from 0, low bit first    (pack-quantized)
                          <layer>.weight_shape    [2]: (out, in)                                     (pack-quantized)
                          <layer>.weight          int8 [out, in]: codes around 0                     (int-quantized)
                          <layer>.weight_scale    [out, groups], in the dtype of the model
                          <layer>.weight_zero_point  int8 [out, groups], where the grid has one      (int-quantized)
                          <layer>.input_scale     [1], where inputs have a static scale
                          every other parameter and buffer under its own name and dtype

transformers turns codes into float weights in the first forward pass and quantizes activations in every one. Its grids are fixed: largest
magnitude over half the range (127.5 at 8 bits), codes -128 to 127, a division, all in the dtype of the activations.
"""

from lightning_qat.formats.compressed_tensors.format import CompressedTensorsFormat

__all__ = ["CompressedTensorsFormat"]
