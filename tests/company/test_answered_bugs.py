"""The table of answered bugs names tests that exist, and an answer without a test says why."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "docs" / "answered-bugs.md").read_text("utf-8").splitlines() if line.startswith("| ")]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`([\w/]+\.py::\w+)`", row)})


@cache
def functions_in(path):
    return {node.name for node in ast.parse((ROOT / "tests" / path).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("named", NAMED)
def test_a_named_test_exists(named):
    path, name = named.split("::")
    assert (ROOT / "tests" / path).is_file()
    assert name in functions_in(path)


def test_every_bug_of_the_removed_callback_has_a_row():
    text = "\n".join(ROWS)
    assert all(f"PL#{number}]" in text for number in (6457, 15862, 12896, 11047, 8540, 8485, 16609, 7926))


def test_a_row_without_a_test_claims_nothing():
    bare = [row for row in ROWS if not re.search(r"\.py::", row) and not row.startswith(("| thread", "| beside"))]
    honest = ("not yet", "no claim", "this table", "what this library is for")
    assert [row for row in bare if not any(words in row for words in honest)] == []
    assert len(ROWS) > 40
