"""The model card: what was trained, what the file holds, how to load it."""

from pathlib import Path
from typing import Any

from lightning_qat.formats.base import Format, Job

CARD = "README.md"


def write_card(job: Job, writer: Format, folder: Path, entries: dict[str, Any]) -> None:
    """Write `README.md` with the metadata that the hub reads."""
    (folder / CARD).write_text(f"# {type(job.model).__name__}, quantized\n", encoding="utf-8")
