"""Quantizers: one rule for finding scales to a file, found by its registered name.

To add one, write `quantizers/foo.py` with a :class:`~lightning_qat.quantizers.base.Quantizer` under
``@quantizers.register("foo")``; the scheme, the layers, the exporters and the conformance tests find it.
"""

from lightning_qat.quantizers.base import Quantizer, blocking_of, quantizers
from lightning_qat.quantizers.building import build_quantizer, fake_quantize, quantize_tensor

quantizers.names()  # finds them now: inside a graph that torch.compile traces nothing can be imported

__all__ = ["Quantizer", "blocking_of", "build_quantizer", "fake_quantize", "quantize_tensor", "quantizers"]
