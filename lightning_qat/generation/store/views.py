"""The samples of a store for other programs."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

    from lightning_qat.generation.store import GenerationStore


def rows(store: "GenerationStore", tokenizer: Any = None) -> Iterator[dict[str, Any]]:
    """Each sample as `index`, `text` if there is a tokenizer, and `input_ids`, by number."""
    for index in store.records["index"].tolist():
        ids = store.view(index)["tokens"].tolist()
        yield {"index": index, **({} if tokenizer is None else {"text": tokenizer.decode(ids)}), "input_ids": ids}


def to_jsonl(store: "GenerationStore", path: Path, tokenizer: Any = None) -> None:
    """Write each sample as a line of JSON (see :func:`rows`); the file is there when it is whole.

    Raises:
        ValueError: The file cannot be written, or a sample is damaged.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows(store, tokenizer):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise ValueError(f"path: cannot write {str(path)!r}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def to_dataset(store: "GenerationStore", tokenizer: Any = None) -> "datasets.Dataset":
    """A data set with the columns of :func:`rows`, written to the cache of Hugging Face's `datasets` one sample after the other.

    Raises:
        ValueError: The package is missing, or a sample is damaged.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("to_dataset: needs the package datasets; pip install 'lightning-qat[datasets]'") from error
    columns = {"index": datasets.Value("int64"), "text": datasets.Value("string"), "input_ids": datasets.List(datasets.Value("int32"))}
    if tokenizer is None:
        del columns["text"]
    features = datasets.Features(columns)
    if not len(store.records):
        return datasets.Dataset.from_dict({name: [] for name in columns}, features)
    try:
        return datasets.Dataset.from_generator(rows, features=features, gen_kwargs={"store": store, "tokenizer": tokenizer})
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error
