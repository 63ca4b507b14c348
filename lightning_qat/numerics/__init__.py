"""Pure tensor functions: code grids, ranges and scales, the fake-quantize op, and bit packing."""
