"""The bytes of GGUF's block types, as ggml lays them out.

A row is cut into blocks of 32 or 256 columns. A block holds codes, an fp16 scale `d`, and for some types what is subtracted:

    centred    Q8_0 Q4_0 Q5_0 Q3_K Q6_K TQ1_0 TQ2_0    d * code
    lowered    Q2_K Q4_K                               d * steps * code - minimum * minima
    shifted    Q4_1                                    d * code - minimum                      (the file holds -minimum)

The K types give sub-blocks of 16 or 32 columns small integer multiples of `d`. Here all sub-blocks of a block have the same one (`steps`,
`minima`), so that a block is one group of the trained grid and nothing is quantized twice.

Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h and the dequantize functions beside it.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_qat.formats.gguf.planes import Bytes, Codes, Plane

Form = Literal["centred", "lowered", "shifted"]


class Blocks(NamedTuple):
    """Blocks of one type, one to a row.

    Attributes:
        codes: int16 [blocks, size].
        scale: fp16 [blocks].
        minimum: fp16 [blocks], or None for centred types.
        minima: uint8 [blocks]: how many minima are subtracted, or None for centred types.
        steps: How many scales lie between two codes.
    """

    codes: Codes
    scale: NDArray[np.float16]
    minimum: NDArray[np.float16] | None = None
    minima: Bytes | None = None
    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One type of block.

    Args:
        name: Its name in ggml.
        size: Columns of a block.
        nbytes: Bytes of a block.
        low: Smallest code.
        high: Largest code.
        planes: Where the bits of codes lie; planes of base three follow each other, others are added up.
        scale: Byte at which the fp16 scale begins.
        form: What a code stands for.
        minimum: Byte at which the fp16 minimum begins, for types that have one.
        multiples: Bytes that hold the multiples of sub-blocks, (first, last + 1), or None.
    """

    name: str
    size: int
    nbytes: int
    low: int
    high: int
    planes: tuple[Plane, ...]
    scale: int
    form: Form = "centred"
    minimum: int | None = None
    multiples: tuple[int, int] | None = None

    @property
    def bits(self) -> float:
        """Bits of a column, scales included."""
        return 8 * self.nbytes / self.size

    def pack(self, blocks: Blocks) -> Bytes:
        """The bytes of blocks, [blocks, nbytes]."""
        packed = np.zeros((len(blocks.codes), self.nbytes), np.uint8)
        columns = 0
        for plane in self.planes:
            width = self._columns(plane)
            part = blocks.codes[:, columns : columns + width] if plane.digits else blocks.codes
            columns += width if plane.digits else 0
            written = plane.pack(part - self.low)
            packed[:, plane.first : plane.first + written.shape[1]] |= written
        if self.name == "Q8_0":
            packed[:, 2:] ^= 0x80  # two's complement, not counted from the smallest
        _put_half(packed, self.scale, blocks.scale)
        if self.minimum is not None and blocks.minimum is not None:
            _put_half(packed, self.minimum, -blocks.minimum if self.form == "shifted" else blocks.minimum)
        if self.multiples is not None:
            packed[:, slice(*self.multiples)] = _MULTIPLES[self.name](blocks)
        return packed

    def unpack(self, packed: Bytes) -> Blocks:
        """What :meth:`pack` was given.

        Raises:
            ValueError: Sub-blocks of one block have different multiples of its scale, which this library never writes.
        """
        parts = [plane.unpack(packed[:, plane.first : plane.first + self._bytes(plane)]) for plane in self.planes]
        codes = np.concatenate(parts, 1) if self.planes[0].digits else np.add.reduce(parts)
        if self.name == "Q8_0":
            codes = codes ^ 0x80
        minimum = None if self.minimum is None else _half(packed, self.minimum)
        blocks = Blocks(np.asarray(codes + self.low, np.int16), _half(packed, self.scale), minimum)
        if self.form == "shifted" and minimum is not None:
            return blocks._replace(minimum=-minimum, minima=np.ones(len(packed), np.uint8))
        return blocks if self.multiples is None else self._with_multiples(blocks, packed[:, slice(*self.multiples)])

    def _with_multiples(self, blocks: Blocks, written: Bytes) -> Blocks:
        steps: Any
        minima: Any
        if self.name == "Q2_K":
            steps, minima = written[:, 0] & 15, written[:, 0] >> 4
        elif self.name == "Q4_K":
            steps = (written[:, 8] & 15) | (written[:, 0] >> 6 << 4)
            minima = (written[:, 8] >> 4) | (written[:, 4] >> 6 << 4)
        else:
            steps, minima = np.ones(len(written), np.uint8), None
        step = int(steps[0]) if len(steps) else 1
        read = blocks._replace(steps=step, minima=minima)
        if (steps != step).any() or (_MULTIPLES[self.name](read) != written).any():
            raise ValueError(f"{self.name}: sub-blocks of one block have different scales")
        return read

    def _columns(self, plane: Plane) -> int:
        """Columns of a block that a plane holds: all, but for base three, whose planes follow each other."""
        if not plane.digits:
            return self.size
        ends = [other.first for other in self.planes if other.first > plane.first]
        return (min(ends, default=self.scale) - plane.first) * plane.digits

    def _bytes(self, plane: Plane) -> int:
        return self._columns(plane) // plane.parts


def _put_half(packed: Bytes, first: int, values: NDArray[np.float16]) -> None:
    packed[:, first : first + 2] = np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(-1, 2)


def _half(packed: Bytes, first: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(packed[:, first : first + 2]).view("<f2").reshape(-1)


def _of_q2_k(blocks: Blocks) -> Any:
    """A byte for each of 16 sub-blocks: low nibble steps, high nibble minima."""
    assert blocks.minima is not None
    return ((blocks.minima << 4) | blocks.steps)[:, None]


def _of_q3_k(blocks: Blocks) -> Any:
    """Six bits for each of 16 sub-blocks, counted from -32: 33 is one step."""
    return np.array([0x11] * 8 + [0xAA] * 4, np.uint8)


def _of_q4_k(blocks: Blocks) -> Any:
    """Six bits of steps and six of minima for each of 8 sub-blocks: the first four whole, of the others the upper two bits elsewhere."""
    assert blocks.minima is not None
    minima, steps = blocks.minima, np.full_like(blocks.minima, blocks.steps)
    four = [(part & 63) | (part >> 4 << 6) for part in (steps, minima)] + [(steps & 15) | ((minima & 15) << 4)]
    return np.repeat(np.stack(four, 1), 4, 1)


def _of_q6_k(blocks: Blocks) -> Any:
    """One int8 for each of 16 sub-blocks."""
    return np.uint8(1)


_MULTIPLES = {"Q2_K": _of_q2_k, "Q3_K": _of_q3_k, "Q4_K": _of_q4_k, "Q6_K": _of_q6_k}

# From the smallest: the first that fits is taken.
_TERNARY = (Plane(0, 0, 32, digits=5), Plane(32, 0, 16, digits=5), Plane(48, 0, 4, digits=4))
_TYPES = (
    BlockType(name="TQ1_0", size=256, nbytes=54, low=-1, high=1, planes=_TERNARY, scale=52),
    BlockType(name="TQ2_0", size=256, nbytes=66, low=-1, high=1, planes=(Plane(0, 2, 32),), scale=64),
    BlockType(
        name="Q2_K", size=256, nbytes=84, low=0, high=3, planes=(Plane(16, 2, 32),), scale=80, form="lowered", minimum=82, multiples=(0, 16)
    ),
    BlockType(
        name="Q3_K", size=256, nbytes=110, low=-4, high=3, planes=(Plane(32, 2, 32), Plane(0, 1, 32, 2)), scale=108, multiples=(96, 108)
    ),
    BlockType(name="Q4_0", size=32, nbytes=18, low=-8, high=7, planes=(Plane(2, 4, 16),), scale=0),
    BlockType(
        name="Q4_K", size=256, nbytes=144, low=0, high=15, planes=(Plane(16, 4, 32),), scale=0, form="lowered", minimum=2, multiples=(4, 16)
    ),
    BlockType(name="Q4_1", size=32, nbytes=20, low=0, high=15, planes=(Plane(4, 4, 16),), scale=0, form="shifted", minimum=2),
    BlockType(name="Q5_0", size=32, nbytes=22, low=-16, high=15, planes=(Plane(6, 4, 16), Plane(2, 1, 1, 4)), scale=0),
    BlockType(
        name="Q6_K",
        size=256,
        nbytes=210,
        low=-32,
        high=31,
        planes=(Plane(0, 4, 64), Plane(128, 2, 32, 4)),
        scale=208,
        multiples=(192, 208),
    ),
    BlockType(name="Q8_0", size=32, nbytes=34, low=-128, high=127, planes=(Plane(2, 8, 32),), scale=0),
)
BLOCK_TYPES: dict[str, BlockType] = {kind.name: kind for kind in _TYPES}
