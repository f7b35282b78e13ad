"""docs/conformance.md says which test holds which behaviour, and is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
DOCUMENT = TESTS.parent / "docs/conformance.md"
REFERENCE = re.compile(r"`([\w/]+\.py)::(\w+)`")
OURS_ALONE = "## Ours alone"


def functions(path: Path) -> set[str]:
    """The names of a file's tests."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows(text: str) -> list[tuple[str, str]]:
    """The rows of all tables, heads and lines below heads left out."""
    found = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("| ") or lines[number + 1 : number + 2] == ["|---|---|"]:
            continue
        left, _, right = line.strip("| ").partition(" | ")
        found.append((left, right))
    return found


def named() -> set[tuple[str, str]]:
    """File and name of each test of ours that the document names."""
    text = DOCUMENT.read_text()
    found = set(REFERENCE.findall(text))
    for file, tests in rows(text[text.index(OURS_ALONE) :]):
        found |= {(file, test) for test in re.findall(r"`(\w+)`", tests)}
    return found


def test_every_test_that_is_named_exists() -> None:
    wrong = []
    for file, test in sorted(named()):
        path = TESTS / file
        if not path.exists() or test not in functions(path):
            wrong.append(f"{file}::{test}")
    assert not wrong, f"{DOCUMENT.name} names what is gone: {wrong}"


def test_every_test_of_the_suite_is_named() -> None:
    suite = {
        (f"conformance/{path.name}", test)
        for path in (TESTS / "conformance").glob("test_*.py")
        for test in functions(path)
    }
    assert not suite - named(), "say in docs/conformance.md what these cover"


def test_every_row_has_a_test_or_a_reason() -> None:
    text = DOCUMENT.read_text()
    theirs = rows(text[text.index("## dmtest-python") : text.index(OURS_ALONE)])
    # 43 + 10 + 2 names of dmtest-python and the older suite's, several to a row.
    assert sum(len(names.split(", ")) for names, _ in theirs) > 300
    for names, ours in theirs:
        assert REFERENCE.search(ours) or re.match(r"left out: \S.{10,}", ours), names
