"""Speed and memory of fake quantization, always next to the same work unquantized in the same run: ``python -m benchmarks --help``."""
