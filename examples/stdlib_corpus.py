"""The corpus of the bundled teacher: source code of one pinned Python standard library.

Selection is a pure function of the interpreter's own files, so anybody with the same Python gets the same split:
tests, encodings, generated tables and near-duplicates are left out, and whole modules are held out by name.
"""

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PINNED_PYTHON = "3.11.7"
EXCLUDED_FOLDERS = {
    "site-packages", "encodings", "pydoc_data", "lib2to3", "test", "tests", "idle_test", "__pycache__"
}  # fmt: skip
HELD_OUT_BYTES = 280_000
SHINGLE = 12  # words; two modules that share a fifth of their shingles count as near-duplicates


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file: its path below the standard library, and its text."""

    name: str
    text: str

    @property
    def rank(self) -> str:
        """A stable pseudo-random order that does not depend on the file system."""
        return hashlib.sha256(self.name.encode()).hexdigest()


def is_generated_table(text: str) -> bool:
    """Tables of numbers or names say nothing about how code reads; they would dominate a small model's loss."""
    words = re.findall(r"\w+", text)
    numbers = sum(word[0].isdigit() for word in words)
    literals = len(re.findall(r"^\s*['\"].{0,40}['\"]\s*[:,]", text, flags=re.MULTILINE))
    return numbers > 0.25 * max(len(words), 1) or literals > 0.35 * text.count("\n")


def shingles(text: str) -> set[int]:
    words = re.findall(r"\w+", text)
    return {hash(tuple(words[i : i + SHINGLE])) for i in range(max(len(words) - SHINGLE, 1))}


def collect(root: Path | None = None) -> list[Module]:
    """All ordinary modules in a stable order, near-duplicates removed (the first in that order stays)."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    kept: list[Module] = []
    seen: set[int] = set()
    paths = (p for p in root.rglob("*.py") if not EXCLUDED_FOLDERS & set(p.relative_to(root).parts))
    modules = (Module(name=p.relative_to(root).as_posix(), text=p.read_text("utf-8", "replace")) for p in paths)
    for module in sorted(modules, key=lambda m: m.rank):
        if len(module.text) < 200 or module.name.startswith("_sysconfigdata") or is_generated_table(module.text):
            continue
        own = shingles(module.text)
        if len(own & seen) > 0.2 * len(own):
            continue
        seen |= own
        kept.append(module)
    return kept


def split(modules: list[Module]) -> tuple[list[Module], list[Module]]:
    """(train, held-out): whole modules of 2 to 30 kB in the stable order until HELD_OUT_BYTES are full."""
    held_out: list[Module] = []
    size = 0
    for module in modules:
        length = len(module.text.encode())
        if 2_000 <= length <= 30_000 and size + length <= HELD_OUT_BYTES:
            held_out.append(module)
            size += length
    names = {m.name for m in held_out}
    return [m for m in modules if m.name not in names], held_out
