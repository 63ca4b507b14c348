"""Speed and memory of fake quantization, always next to the same work unquantized in the same run: ``python -m benchmarks --help``."""

import os

# transformers imports torchao by itself; none of torchao's own kernels take part here, and on some machines loading them only warns.
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
