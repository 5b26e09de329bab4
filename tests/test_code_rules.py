"""The rules of CONTRIBUTING.md that no linter checks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tessera").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_at_most_300_lines_and_says_what_it_is_for(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 300
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{node.name} is too long"
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert statement.name.startswith("_") or ast.get_docstring(statement), f"{statement.name} has no docstring"


def test_nothing_unpickles_or_runs_code_that_came_with_data() -> None:
    forbidden = re.compile(
        r"\b(pickle|dill|cloudpickle|marshal|shelve)\b|torch\.load\(|trust_remote_code=True|yaml\.load\(|\beval\("
    )
    for path in FILES:
        code = "\n".join(line for line in path.read_text().splitlines() if not line.strip().startswith("#"))
        docstrings_out = re.sub(r'"""[\s\S]*?"""', "", code)
        assert not (found := forbidden.search(docstrings_out)), f"{path}: {found}"
