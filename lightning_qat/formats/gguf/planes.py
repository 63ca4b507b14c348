"""Where the bits of codes lie in a block: codes of 8 bits and fewer are cut into parts, and parts of several codes share a byte."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Codes = NDArray[np.int16]


class Plane(NamedTuple):
    """Where some bits of every code lie.

    Codes are taken in chunks of ``run * digits``. Byte `i` of a chunk holds the parts of codes ``i``, ``i + run``, ``i + 2 * run``, ...

    Attributes:
        first: First byte in the block.
        width: Bits of a part; 0 for digits in base three.
        run: Bytes of a chunk.
        low: The part begins at this bit of the code.
        digits: Parts in a byte.
    """

    first: int
    width: int
    run: int
    low: int = 0
    digits: int = 0

    @property
    def parts(self) -> int:
        """Parts in a byte."""
        return self.digits or 8 // self.width

    def pack(self, codes: Codes) -> Bytes:
        """Codes counted from 0, [blocks, columns], to bytes."""
        chunks = codes.reshape(len(codes), -1, self.parts, self.run)
        if self.digits:
            places = 3 ** np.arange(4, 4 - self.digits, -1, dtype=np.uint16)
            number = (chunks.astype(np.uint16) * places[:, None]).sum(2, dtype=np.uint16)
            # A byte is a fraction of 256, rounded up: each multiplication by three pushes out one digit.
            packed = ((number.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)
        else:
            shifts = (self.width * np.arange(self.parts)).astype(np.uint8)
            part = ((chunks >> self.low) & (2**self.width - 1)).astype(np.uint8)
            packed = np.bitwise_or.reduce(part << shifts[:, None], axis=2)
        return packed.reshape(len(codes), -1)

    def unpack(self, packed: Bytes) -> Codes:
        """The inverse of :meth:`pack`."""
        chunks = packed.reshape(len(packed), -1, 1, self.run)
        if self.digits:
            places = (3 ** np.arange(self.digits)).astype(np.uint8)
            part = ((chunks * places[:, None]).astype(np.uint16) * 3 >> 8).astype(np.int16)
        else:
            shifts = (self.width * np.arange(self.parts)).astype(np.uint8)
            part = ((chunks >> shifts[:, None]) & (2**self.width - 1)).astype(np.int16) << self.low
        return part.reshape(len(packed), -1)
