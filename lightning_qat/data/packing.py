"""Several samples in a row, so that no row is mostly padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import Dataset

from lightning_qat.data.datasets import Item, PackedRows


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows as can be found quickly: the longest first, each where it leaves least room (best fit decreasing).

    At worst about 11/9 of the fewest possible rows; usually all but the last few are full. The result depends on the arguments only.

    Args:
        lengths: Tokens of each sample, 1 to `capacity`.
        capacity: Tokens of a row.

    Returns:
        For each row, the places of its samples in `lengths`, each place once.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by the room they have left
    rooms: list[int] = []  # the keys, sorted
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, room = lengths[place], capacity
        if (at := bisect_left(rooms, length)) < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(place)
        if (left := room - length) > 0:
            if left not in open_rows:
                insort(rooms, left)
            open_rows.setdefault(left, []).append(row)
    return rows


def in_rows(samples: Dataset[Item], lengths: Sequence[int], capacity: int, what: str) -> PackedRows:
    """A dataset, several samples to a row; says how full the rows are.

    Args:
        samples: The samples.
        lengths: Tokens of each.
        capacity: Tokens of a row.
        what: What the samples are called.
    """
    rows = pack(lengths, capacity)
    fill = sum(lengths) / (len(rows) * capacity)
    rank_zero_info(f"packing: {len(lengths):,} {what} in {len(rows):,} rows of {capacity:,} tokens, {fill:.1%} full")
    return PackedRows(samples, rows)
