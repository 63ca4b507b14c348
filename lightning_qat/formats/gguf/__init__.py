"""GGUF, the file of llama.cpp: the trained codes and scales in ggml's block types, metadata and tokenizer in one file.

    model.gguf       all of it; nothing else is needed to serve the model
    config.json      only for transformers, where its reader leaves out something that the file says (scaled rotary embeddings)

Which type holds which weight is told in :mod:`~lightning_qat.formats.gguf.encoding`; ggml's own quantizers are never called, because their
rules are others (Q4_0: signed maximum over -8). Every export is read back with the `gguf` package, codes, scales and values bit for bit,
and run by transformers, which dequantizes the file and computes in floating point. llama.cpp itself quantizes the inputs of every product
(Q4_0, Q5_0, Q8_0: groups of 32, amax/127, fp16 scales; K types and ternary: groups of 256): train with ``llama.cpp-w4a8`` to see that.
"""

from lightning_qat.formats.gguf.format import GgufFormat

__all__ = ["GgufFormat"]
