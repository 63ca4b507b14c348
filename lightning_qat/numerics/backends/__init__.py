"""Ways of computing the same codes: plain torch, torch compiled for the CPU, and hand-written Triton kernels for CUDA.

All of them agree bit for bit with :mod:`~lightning_qat.numerics.backends.reference` on tensors that are at hand; which one runs is a
matter of speed and decided in :mod:`~lightning_qat.numerics.backends.choice`.
"""
