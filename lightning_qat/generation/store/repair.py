"""Finding damaged samples and dropping them, so that they are generated again; intact ones stay where they are."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path

from lightning_qat.generation.store.durable import replace_file, sync
from lightning_qat.generation.store.shards import Shard


def damaged_samples(shards: Iterable[Shard]) -> list[str]:
    """Samples whose data does not have the checksum that their record says, a sentence each; reads everything."""
    found = []
    for shard in shards:
        for record in shard.load().records:
            try:
                fault = shard.read(record)
            except OSError as error:
                fault = f"not readable ({error.strerror})"
            if isinstance(fault, str):
                found.append(f"{shard.data.name}: sample {record['index']} is {fault}")
        shard.close()
    return found


def repair_shard(shard: Shard) -> list[str]:
    """Rewrite the index of a shard with its intact samples, or set both files aside if there is none; what was done, a sentence each.

    Raises:
        OSError: A file cannot be read or written. What cannot be read now may be whole, so nothing is dropped for that.
    """
    raw = shard.index.read_bytes() if shard.index.exists() else b""
    records, _ = shard.intact_records(raw)  # those of a damaged header too: each record says itself whose it is
    intact = records[[not isinstance(shard.read(record), str) for record in records]]
    shard.close()
    if len(intact) == len(records) and not shard.load().damage:
        return []
    if not len(intact):
        return [_set_aside(path) for path in (shard.index, shard.data) if path.exists()]
    replace_file(shard.index, shard.layout.header + intact.tobytes())
    return [f"{shard.index.name}: written anew with its {len(intact)} intact samples"]


def _set_aside(path: Path) -> str:
    names = (path.with_name(f"{path.name}.{number}.damaged") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    os.rename(path, aside)
    sync(path.parent)
    return f"{path.name}: holds no intact sample, set aside as {aside.name}"
