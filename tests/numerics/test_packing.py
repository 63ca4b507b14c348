import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qat.numerics.packing import pack, packed_columns, unpack


def as_integer(row: list[int], bits: int, qmin: int) -> int:
    """A row of codes as one long integer, the first code in the lowest bits."""
    return sum((code - qmin) << (bits * i) for i, code in enumerate(row))


@settings(deadline=None, max_examples=150)
@given(bits=st.integers(1, 8), offset=st.integers(0, 255), rows=st.integers(0, 5), columns=st.integers(0, 19), data=st.data())
def test_round_trip_and_layout(bits: int, offset: int, rows: int, columns: int, data: st.DataObject) -> None:
    qmin = -(offset % 2**bits)
    numbers = st.lists(st.integers(qmin, qmin + 2**bits - 1), min_size=columns, max_size=columns)
    table = data.draw(st.lists(numbers, min_size=rows, max_size=rows))
    codes = torch.tensor(table, dtype=torch.int16).reshape(rows, columns)
    packed = pack(codes, bits, qmin)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (rows, packed_columns(columns, bits)))
    assert torch.equal(unpack(packed, bits, qmin, columns), codes)
    for row, stored in zip(table, packed.tolist(), strict=True):
        assert int.from_bytes(bytes(stored), "little") == as_integer(row, bits, qmin)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_of_every_width(bits: int) -> None:
    for qmin, dtype in ((0, torch.uint8), (-(2 ** (bits - 1)), torch.int8)):
        codes = torch.arange(qmin, qmin + 2**bits).to(dtype).unsqueeze(0)
        assert torch.equal(unpack(pack(codes, bits, qmin), bits, qmin, 2**bits), codes.to(torch.int16))


SEEDS = 1000


def numpy_pack(codes: np.ndarray, bits: int, qmin: int) -> np.ndarray:
    """The same layout by numpy's own bit packing."""
    digits = np.unpackbits((codes - qmin).astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(digits.reshape(len(codes), -1), axis=-1, bitorder="little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_thousand_random_matrices_of_odd_shapes(bits: int) -> None:
    for seed in range(SEEDS):
        draw = np.random.default_rng(seed)
        rows, columns = 2 * draw.integers(0, 5) + 1, 2 * draw.integers(0, 35) + 1
        qmin = -int(draw.integers(0, 2**bits))
        codes = draw.integers(qmin, qmin + 2**bits, (rows, columns))
        packed = pack(torch.from_numpy(codes), bits, qmin)
        assert np.array_equal(packed.numpy(), numpy_pack(codes, bits, qmin)), seed
        assert np.array_equal(unpack(packed, bits, qmin, columns).numpy(), codes), seed


def test_bytes_computed_by_hand() -> None:
    # 1 2 3 4 5 at three bits, low bit first: 100 010 11|0 001 101, so the bytes are 1 + 16 + 64 + 128 and 8 + 16 + 64.
    codes = torch.tensor([[1, 2, 3, 4, 5], [-4 + 4, 0, 0, 0, 7]])
    assert pack(codes, 3, 0).tolist() == [[209, 88], [0, 112]]
    assert pack(codes - 4, 3, -4).tolist() == [[209, 88], [0, 112]]
    assert pack(torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1]]), 1, 0).tolist() == [[1, 1]]
    assert pack(torch.tensor([[-8, 7, 0]]), 4, -8).tolist() == [[0xF0, 0x08]]


@pytest.mark.parametrize(("columns", "bits", "size"), [(8, 1, 1), (9, 1, 2), (5, 3, 2), (3, 8, 3), (0, 4, 0), (1, 7, 1), (8, 7, 7)])
def test_packed_columns(columns: int, bits: int, size: int) -> None:
    assert packed_columns(columns, bits) == size


@pytest.mark.parametrize(
    ("code", "bits", "qmin"),
    [(16, 4, 0), (-1, 4, 0), (8, 4, -8), (-9, 4, -8), (2, 1, 0), (256, 8, 0), (65536 + 3, 4, 0), (2**40, 8, 0)],
    ids=["above", "below", "signed-above", "signed-below", "one-bit", "eight-bit", "wraps-at-16-bits", "wraps-at-32-bits"],
)
def test_a_code_that_does_not_fit_is_refused(code: int, bits: int, qmin: int) -> None:
    with pytest.raises(ValueError, match=rf"pack: .*\[{qmin}, {qmin + 2**bits - 1}\]"):
        pack(torch.tensor([[qmin, code]]), bits, qmin)


def test_a_row_starts_on_a_byte_of_its_own() -> None:
    codes = torch.randint(0, 8, (4, 5))
    assert torch.equal(pack(codes[2:3], 3, 0)[0], pack(codes, 3, 0)[2])


def test_transposed_codes() -> None:
    codes = torch.randint(-4, 4, (7, 3), dtype=torch.int8)
    assert torch.equal(unpack(pack(codes.t(), 3, -4), 3, -4, 7), codes.t().to(torch.int16))
