"""Codes of 1 to 8 bits as a stream of bits, low bit first, each row starting on a byte of its own.

Row alignment costs at most 7 bits a row and lets a kernel find any row without unpacking the ones before it.
"""

import torch
from torch import Tensor


def packed_columns(columns: int, bits: int) -> int:
    """Bytes that one row of `columns` codes takes."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """Pack integer codes.

    Args:
        codes: Integers in [qmin, qmin + 2^bits - 1], shape [rows, columns].
        bits: Bits per code, 1 to 8.
        qmin: What is subtracted before packing, so that stored numbers start at 0.

    Returns:
        uint8, shape [rows, ceil(columns * bits / 8)].

    Raises:
        ValueError: A code does not fit.
    """
    rows, columns = codes.shape
    words_in_row = (columns + 7) // 8
    unsigned = codes.to(torch.int64) - qmin
    if codes.numel() and (int(unsigned.min()) < 0 or int(unsigned.max()) >= 2**bits):
        raise ValueError(f"pack: codes lie outside [{qmin}, {qmin + 2**bits - 1}], the range of {bits} bits from {qmin}")
    # Eight codes are `bits` whole bytes of one word.
    eights = torch.nn.functional.pad(unsigned, (0, -columns % 8)).reshape(rows, words_in_row, 8)
    words = (eights << _shifts(bits, codes)).sum(-1, keepdim=True)
    stream = words.view(torch.uint8)[..., :bits].reshape(rows, words_in_row * bits)
    return stream[:, : packed_columns(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, qmin: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: int16 codes, shape [rows, columns]."""
    rows, words_in_row = packed.shape[0], (columns + 7) // 8
    parts = torch.nn.functional.pad(packed, (0, words_in_row * bits - packed.shape[1])).reshape(rows, words_in_row, bits)
    words = torch.nn.functional.pad(parts, (0, 8 - bits)).view(torch.int64)
    unsigned = ((words >> _shifts(bits, packed)) & (2**bits - 1)).to(torch.int16)
    return unsigned.reshape(rows, words_in_row * 8)[:, :columns] + qmin


def _shifts(bits: int, like: Tensor) -> Tensor:
    return torch.arange(0, 8 * bits, bits, device=like.device)


def pack_bits(bits: Tensor) -> Tensor:
    """Zeros and ones (or booleans), shape [rows, n], as uint8 [rows, ceil(n / 8)], low bit first."""
    rows, columns = bits.shape
    stream = torch.nn.functional.pad(bits.to(torch.uint8), (0, -columns % 8)).reshape(rows, packed_columns(columns, 1), 8)
    weights = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_bits`: booleans, shape [rows, columns]."""
    return ((packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1).bool().flatten(-2)[:, :columns]
