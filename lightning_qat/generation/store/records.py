"""Samples and their records as bytes: what the files of a store are made of (:mod:`lightning_qat.generation.store.shards`).

All checksums start from a salt that is drawn from what the samples were generated from: a record or a sample of other settings does not
pass for one of these, even where the header that says so is damaged.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_qat.generation.sample import Sample

FORMAT_VERSION = 2
MAGIC = b"LQATGEN\0"
HEADER = struct.Struct("<8sII32s12xI")  # magic, version, vocabulary size, digest of the identity, checksum
RECORD = np.dtype(
    [
        ("index", "<u8"),  # the sample's number in the set
        ("offset", "<u8"),  # of its first byte in the data file
        ("hash", "<u8"),  # of its tokens: equal samples have equal ones
        ("tokens", "<u4"),
        ("chosen", "<u4"),  # how many tokens the teacher chose
        ("nll", "<f4"),  # of those, in nats, summed
        ("repetition", "<f4"),  # share of its runs of 4 tokens that occurred before in it
        ("flags", "<u4"),  # which arrays it has
        ("width", "<u4"),  # numbers per row of the targets
        ("data_crc", "<u4"),
        ("crc", "<u4"),  # of the record, without this field
    ]
)
ROLES, TAILS, TOP_K, LOGITS = 1, 2, 4, 8  # flags
FLAGS: dict[str, dict[str, int]] = {  # arrays of a sample, the dtypes they may have, and the flag that says so
    "tokens": {"int64": 0},
    "roles": {"uint8": ROLES},
    "tails": {"float32": TAILS},
    "targets": {"int32": TOP_K, "float16": LOGITS},
}
FOREIGN = "it is foreign, its samples were generated with other settings"
_SEALED = RECORD.itemsize - 4  # bytes of a record that its checksum covers


@dataclass(frozen=True)
class ShardFormat:
    """How samples of one identity are laid out.

    Attributes:
        digest: SHA-256 of the identity.
        vocab_size: Number of token ids.
    """

    digest: bytes
    vocab_size: int

    @classmethod
    def of(cls, identity: dict[str, Any]) -> "ShardFormat":
        """The layout for samples of this identity; a ValueError if it does not say how many token ids there are."""
        size = identity.get("vocab_size")
        if not isinstance(size, int) or not 1 <= size <= 2**31:
            raise ValueError(f"identity: got vocab_size {size!r}, expected the number of the teacher's token ids, at most 2^31")
        return cls(hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest(), size)

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every token id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def header(self) -> bytes:
        """The first bytes of an index."""
        content = HEADER.pack(MAGIC, FORMAT_VERSION, self.vocab_size, self.digest, 0)[:-4]
        return content + zlib.crc32(content).to_bytes(4, "little")

    def header_fault(self, header: bytes) -> str | None:
        """What is wrong with the first bytes of an index, None if nothing is."""
        if len(header) < HEADER.size:
            return "its header is cut off"
        magic, version, _, digest, crc = HEADER.unpack(header)
        if magic != MAGIC or crc != zlib.crc32(header[:-4]):
            return "its header is damaged"
        if version != FORMAT_VERSION:
            return f"it has format version {version}, this library reads {FORMAT_VERSION}"
        return None if digest == self.digest else FOREIGN

    def crc(self, content: Any) -> int:
        """Checksum of bytes of this identity."""
        return zlib.crc32(content, int.from_bytes(self.digest[:4], "little"))

    def seal(self, records: NDArray[Any]) -> NDArray[Any]:
        """Put the checksums into records."""
        records["crc"] = self._record_crcs(records)
        return records

    def intact(self, records: NDArray[Any]) -> NDArray[np.bool_]:
        """Which records have the checksum that they should have."""
        return np.asarray(records["crc"] == self._record_crcs(records))

    def _record_crcs(self, records: NDArray[Any]) -> NDArray[np.uint32]:
        content = memoryview(records.tobytes())
        starts = range(0, len(content), RECORD.itemsize)
        return np.fromiter((self.crc(content[start : start + _SEALED]) for start in starts), np.uint32, len(records))

    def sizes(self, records: Any) -> Any:
        """Bytes in the data file, of one record or of many."""
        return sum(aligned(dtype.itemsize * rows * columns) * there for _, dtype, there, rows, columns in self._table(records))

    def arrays(self, record: Any) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """Name, dtype and shape of each array of a sample, in the order in which they lie in the data file."""
        for name, dtype, there, rows, columns in self._table(record):
            if there:
                yield name, dtype, (int(rows), int(columns)) if name == "targets" else (int(rows),)

    def _table(self, records: Any) -> Iterator[tuple[str, np.dtype[Any], Any, Any, Any]]:
        """Name, dtype, whether it is there, rows and columns of every array that there may be."""
        tokens, width, flags = (records[field].astype(np.int64) for field in ("tokens", "width", "flags"))
        yield "tokens", self.token_dtype, tokens > 0, tokens, 1
        yield "roles", np.dtype("u1"), flags & ROLES != 0, tokens, 1
        yield "tails", np.dtype("<f4"), flags & TAILS != 0, tokens - 1, 1
        yield "targets", np.dtype("<i4"), flags & TOP_K != 0, tokens - 1, width
        yield "targets", np.dtype("<f2"), flags & LOGITS != 0, tokens - 1, width

    def encode(self, sample: Sample) -> tuple[NDArray[Any], bytes]:
        """A sample as its record, yet without offset and checksum, and the bytes of its data.

        Raises:
            ValueError: A token outside the vocabulary, or an array of another dtype or shape than :class:`Sample` says.
        """
        tensors = {name: tensor for name in FLAGS if (tensor := getattr(sample, name)) is not None}
        record = np.zeros((), RECORD)
        for name, tensor in tensors.items():
            if (given_as := str(tensor.dtype).removeprefix("torch.")) not in FLAGS[name]:
                raise ValueError(f"sample {sample.index}: {name} are {given_as}, expected {' or '.join(FLAGS[name])}")
            record["flags"] |= FLAGS[name][given_as]
        given = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        tokens = given["tokens"]
        if tokens.ndim != 1 or not tokens.size or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"sample {sample.index}: expected one token or more in a row, all of them from 0 to {self.vocab_size - 1}")
        if sample.index < 0 or sample.chosen < 0:
            raise ValueError(f"sample {sample.index}: got {sample.chosen} chosen tokens, expected no negative numbers")
        record["width"] = given["targets"].shape[-1] if "targets" in given else 0
        for field, value in (("index", sample.index), ("tokens", tokens.size), ("chosen", sample.chosen), ("nll", sample.nll)):
            record[field] = value
        parts = []
        for name, dtype, shape in self.arrays(record):
            if given[name].shape != shape:
                raise ValueError(f"sample {sample.index}: {name} have shape {given[name].shape}, expected {shape}")
            content = given[name].astype(dtype).tobytes()
            parts += [content, bytes(-len(content) % 8)]
        blob = b"".join(parts)
        record["repetition"] = repetition(tokens.tolist())
        record["hash"] = int.from_bytes(hashlib.blake2b(parts[0], digest_size=8).digest(), "little")
        record["data_crc"] = self.crc(blob)
        return record, blob


def aligned(size: Any) -> Any:
    """`size` rounded up to a multiple of 8 bytes, where the next array may start: numpy can view any of ours there."""
    return size + -size % 8


def repetition(tokens: list[int]) -> float:
    """Share of the runs of 4 tokens that occurred before in the same sample; 0 for fewer than 5 tokens."""
    runs = list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
