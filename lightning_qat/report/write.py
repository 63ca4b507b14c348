"""From a store to a page."""

from pathlib import Path
from typing import Any

from lightning_qat.generation.store import GenerationStore
from lightning_qat.generation.store.durable import replace_file
from lightning_qat.report.generations import GenerationStatistics, collect
from lightning_qat.report.page import render
from lightning_qat.report.reading import samples_to_read


def write_generation_report(
    store: GenerationStore, out: str | Path, *, tokenizer: Any = None, teacher: Any = None, shown: int = 6, scored: int = 64
) -> GenerationStatistics:
    """Write a page of statistics about generated samples, with some of them to read.

    It is one HTML file that needs no other and no network. Every sample is read once; no more than a few are in memory.

    Args:
        store: The samples.
        out: The file; it is there when it is whole.
        tokenizer: The teacher's; without it, tokens are shown as numbers.
        teacher: The model in eval mode that wrote the samples. With it, the frequencies of tokens are compared with its distributions;
            without it, with those that the store holds, if any.
        shown: How many of the first samples to show; the most repetitive and the least likely ones are shown besides.
        scored: How many samples to compare with the teacher at most.

    Returns:
        The statistics.

    Raises:
        ValueError: The store is empty or damaged, the teacher is another one, or the file cannot be written.
    """
    out = Path(out)
    if shown < 0:
        raise ValueError(f"shown: got {shown}, expected 0 or more samples to show")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out: got {str(out)!r}, expected a file in a folder that is there, for example 'report.html'")
    found = collect(store, tokenizer=tokenizer, teacher=teacher, scored=scored)
    # Not the folder's whole path: where things lie on this machine is nobody's business.
    page = render(found, samples_to_read(store, shown, tokenizer), name=store.folder.resolve().name, tokenizer=tokenizer)
    try:
        replace_file(out, page.encode())
    except OSError as error:
        raise ValueError(f"out: cannot write {str(out)!r}: {error.strerror}; choose another file") from error
    return found
