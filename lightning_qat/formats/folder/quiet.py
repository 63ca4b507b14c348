"""Progress bars of the libraries that read an export: they pass in a blink, and nobody asked for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Bars of tqdm that are made in the block are not shown; those that run already go on.

    transformers' own switch (``disable_progress_bar``) does not reach its GGUF reader, nor compressed-tensors.
    """
    constructor = tqdm.__init__

    def silent(bar: tqdm, *args: Any, **kwargs: Any) -> None:
        constructor(bar, *args, **kwargs | {"disable": True})  # compressed-tensors passes disable=False

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = constructor
