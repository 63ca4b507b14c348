"""Which block type holds a trained weight exactly, and the way from its codes to blocks and back.

    symmetric integers       a centred type that reaches from the smallest to the largest code
    without a zero           (the +-0.5 and +-1.5 levels of two bits) Q2_K: two steps between codes, three minima below zero
    integer zero points      Q2_K and Q4_K subtract them where a block is one group; else a centred type holds code - zero_point
    zero points as values    Q2_K and Q4_K, or Q4_1 in groups of 32

Of those the smallest that has at least the trained bits: TQ1_0 packs three levels into 1.69 bits and TQ2_0 into 2.06, so binary weights
take the first and narrow two-bit weights, which were trained for two bits, the second, which unpacks by shifting.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_qat.formats.exactness.codes import IntegerWeight
from lightning_qat.formats.gguf.blocks import BLOCK_TYPES, Blocks, BlockType
from lightning_qat.formats.gguf.planes import Bytes
from lightning_qat.formats.verification import Stored
from lightning_qat.numerics.grid import Grid
from lightning_qat.quantizers import quantizers

SMALLEST_BLOCK = min(kind.size for kind in BLOCK_TYPES.values())


def block_type(weight: IntegerWeight) -> BlockType:
    """The smallest type that holds a weight exactly.

    Raises:
        ValueError: None does; the message names the layer, its width, and the ways out.
    """
    columns = weight.codes.shape[1]
    if columns % SMALLEST_BLOCK:
        raise ValueError(
            f"{weight.name}: has {columns} inputs, which no GGUF block of {SMALLEST_BLOCK} divides; leave it in floating point with "
            f"exclude=({weight.name.rpartition('.')[2]!r},) in the scheme, or make the layer a multiple of {SMALLEST_BLOCK} wide"
        )
    if weight.group_size % SMALLEST_BLOCK:
        raise ValueError(
            f"{weight.name}: weight.group_size: got {weight.group_size}, a GGUF block of {SMALLEST_BLOCK} columns has one scale; train "
            f"with group_size={SMALLEST_BLOCK} or a multiple of it, or one scale per channel"
        )
    for kind in BLOCK_TYPES.values():
        whole = columns % kind.size == 0 and weight.group_size % kind.size == 0
        if whole and kind.bits >= weight.spec.code_bits and _holds(kind, weight):
            return kind
    raise ValueError(
        f"{weight.name}: no GGUF block type holds {weight.spec.code_bits} bits with symmetric={weight.spec.symmetric}; train it symmetric, "
        "or with at most 7 bits and an integer zero point"
    )


def check_scales(weight: IntegerWeight) -> None:
    """Refuse scales and zero points that are no fp16 numbers.

    Raises:
        ValueError: Naming the layer.
    """
    values = {"scale": weight.scale, "zero point": weight.zero_point if weight.has_float_zero else None}
    for what, tensor in values.items():
        if tensor is not None and not torch.equal(tensor.half().float(), tensor):
            raise ValueError(
                f"{weight.name}: a {what} is no fp16 number, which GGUF stores; train with QuantScheme.parse(scheme, target='gguf')"
                + (" (levels without a zero store half the scale, which is smaller than fp16 can say)" if _grid(weight).offset else "")
            )


def encode(weight: IntegerWeight, kind: BlockType) -> Bytes:
    """The bytes of a weight, uint8 [out, bytes of a row]."""
    rows, columns = weight.codes.shape
    per_group = columns // weight.scale.shape[1] // kind.size

    def spread(values: Tensor | NDArray[Any]) -> NDArray[Any]:
        return np.repeat(np.asarray(values), per_group, axis=1).reshape(-1)

    codes = weight.codes.numpy().astype(np.int16)
    scale = weight.scale.numpy().astype(np.float16)
    if kind.form == "centred":
        blocks = Blocks((codes - _zero(weight)).reshape(-1, kind.size), spread(scale))
    else:
        low, steps = _lowest(weight)
        minimum, minima = scale, np.broadcast_to(np.uint8(-low), scale.shape)
        if weight.has_float_zero and weight.zero_point is not None:
            minimum, minima = -weight.zero_point.numpy().astype(np.float16), np.ones(scale.shape, np.uint8)
        elif weight.zero_point is not None:
            minima = (weight.zero_point.numpy().astype(np.int16) - low).astype(np.uint8)
        blocks = Blocks(((codes - low) // steps).reshape(-1, kind.size), spread(scale), spread(minimum), spread(minima), steps)
    return kind.pack(blocks).reshape(rows, -1)


def decode(packed: Bytes, weight: IntegerWeight, kind: BlockType) -> Stored:
    """What bytes hold, in the terms of a weight.

    Of the weight only the spec is used, and integer zero points where the file holds ``code - zero_point`` and nothing else.

    Raises:
        RuntimeError: Blocks of one group have different scales or zero points.
    """
    rows, columns = weight.codes.shape
    blocks = kind.unpack(packed.reshape(-1, kind.nbytes))

    def by_group(values: NDArray[Any]) -> Tensor:
        grouped = values.reshape(rows, weight.scale.shape[1], -1)
        if (grouped != grouped[..., :1]).any():
            raise RuntimeError(f"export: {weight.name}: blocks of one group read back with different scales")
        return torch.from_numpy(grouped[..., 0].astype(np.float32))

    scale, codes = by_group(blocks.scale), torch.from_numpy(blocks.codes.reshape(rows, columns))
    if kind.form == "centred" or blocks.minimum is None or blocks.minima is None:
        return Stored(codes + torch.from_numpy(_zero(weight)), scale, weight.zero_point)
    low, steps = _lowest(weight)
    minimum, minima = by_group(blocks.minimum), by_group(blocks.minima)
    if weight.has_float_zero:
        zero_point: Tensor | None = -minimum * minima
    else:
        zero_point = None if weight.zero_point is None else minima + low
        same = torch.equal(minimum, scale) and (weight.zero_point is not None or bool((minima == -low).all()))
        if not same:
            raise RuntimeError(f"export: {weight.name}: minima read back differently than they were written")
    return Stored(codes * steps + low, scale * blocks.steps / steps, zero_point)


def _grid(weight: IntegerWeight) -> Grid:
    return quantizers.get(weight.spec.quantizer).build_grid(weight.spec)


def _holds(kind: BlockType, weight: IntegerWeight) -> bool:
    grid = _grid(weight)
    if kind.form == "shifted" or weight.has_float_zero:
        return kind.form != "centred" and weight.has_float_zero and grid.levels - 1 <= kind.high
    if kind.form == "lowered":
        return grid.levels - 1 <= kind.high
    low, high = grid.qmin, grid.qmax
    if weight.zero_point is not None:
        low, high = -grid.qmax, grid.qmax
    elif grid.offset:
        low, high = 2 * low + 1, 2 * high + 1
    return kind.low <= low and high <= kind.high


def _lowest(weight: IntegerWeight) -> tuple[int, int]:
    """The smallest code that is possible, and how far codes are apart."""
    grid = _grid(weight)
    if weight.has_float_zero:
        return 0, 1
    if grid.offset:
        return 2 * grid.qmin + 1, 2
    return (-(2 ** (weight.bits - 1)), 1) if weight.zero_point is not None else (grid.qmin, 1)


def _zero(weight: IntegerWeight) -> NDArray[np.int16]:
    """What is subtracted from each code, int16 [out, in]; zeros without integer zero points."""
    rows, columns = weight.codes.shape
    if weight.zero_point is None or weight.has_float_zero:
        return np.zeros((rows, 1), np.int16)
    return np.repeat(weight.zero_point.numpy().astype(np.int16), columns // weight.zero_point.shape[1], axis=1)
