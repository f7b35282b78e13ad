"""What the linters cannot see: the rules of the layers, of C headers and of the documents."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CSRC = REPOSITORY / "csrc"
HEADERS = sorted((CSRC / "include").rglob("*.h")) + sorted((CSRC / "src").glob("*.h"))
C_FILES = sorted(CSRC.rglob("*.[ch]"))
PYTHON_FILES = sorted((REPOSITORY / "thinpool").rglob("*.py"))

# Each package and what of ours it may import. Dependencies point down only.
BASE = {"thinpool.errors", "thinpool.units", "thinpool.names", "thinpool.model"}
LAYERS: dict[str, set[str]] = {
    "thinpool.errors": set(),
    "thinpool.units": {"thinpool.errors"},
    "thinpool.names": {"thinpool.errors"},
    "thinpool.model": BASE,
    "thinpool._native": set(),
    "thinpool.engine": BASE | {"thinpool._native"},
    "thinpool.check": BASE | {"thinpool._native", "thinpool.engine"},
    "thinpool.format": BASE | {"thinpool._native"},
    "thinpool.host": BASE,
    "thinpool.dm": BASE | {"thinpool.check", "thinpool.engine", "thinpool.host"},
    "thinpool.store": BASE
    | {"thinpool.check", "thinpool.dm", "thinpool.engine", "thinpool.format", "thinpool.host"},
    "thinpool.oci": BASE | {"thinpool.host"},
    "thinpool.server": BASE
    | {
        "thinpool._native",
        "thinpool.check",
        "thinpool.dm",
        "thinpool.engine",
        "thinpool.format",
        "thinpool.host",
        "thinpool.store",
    },
    "thinpool.api": BASE
    | {
        "thinpool",
        "thinpool.check",
        "thinpool.dm",
        "thinpool.engine",
        "thinpool.format",
        "thinpool.host",
        "thinpool.oci",
        "thinpool.server",
        "thinpool.store",
    },
    "thinpool.graphdriver": BASE
    | {"thinpool", "thinpool.api", "thinpool.host", "thinpool.oci", "thinpool.server"},
    "thinpool.bench": BASE
    | {
        "thinpool",
        "thinpool.api",
        "thinpool.check",
        "thinpool.dm",
        "thinpool.engine",
        "thinpool.format",
        "thinpool.host",
        "thinpool.server",
    },
    "thinpool.__main__": {"thinpool.cli"},
    "thinpool.cli": BASE
    | {
        "thinpool",
        "thinpool.api",
        "thinpool.bench",
        "thinpool.check",
        "thinpool.format",
        "thinpool.graphdriver",
        "thinpool.host",
    },
}

BANNED_IN_C = {
    # plain assert vanishes under the NDEBUG that extensions are built with; TP_ASSERT does not
    "assert": "TP_ASSERT",
    "strcpy": "snprintf or memcpy with a length",
    "strcat": "snprintf",
    "sprintf": "snprintf",
    "vsprintf": "vsnprintf",
    "gets": "nothing",
    "strtok": "strtok_r",
    "alloca": "a bounded array or malloc",
    "rand": "a seeded generator",
    "srand": "a seeded generator",
    "system": "nothing: no program is run from C",
    "popen": "nothing: no program is run from C",
    "atoi": "strtol with checks",
    "usleep": "a condition to wait on",
}


def without_comments_and_strings(text: str) -> str:
    """C source whose comments and literals are blanked, line by line in place."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("header", HEADERS, ids=relative)
def test_header_compiles_alone(header: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = "-std=gnu11 -D_GNU_SOURCE -Wall -Wextra -Werror -fsyntax-only -x c"
    result = subprocess.run(
        [compiler, *shlex.split(flags), "-I", str(CSRC / "include"), "-I", str(CSRC / "src"),
         str(header)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # A header as main file is told so by gcc's "#pragma once" check only; we use guards.
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("header", HEADERS, ids=relative)
def test_header_opens_with_licence_and_purpose(header: Path) -> None:
    lines = header.read_text().splitlines()
    assert lines[0] == "/* SPDX-License-Identifier: Apache-2.0 */"
    assert lines[1].startswith("/*"), "the second line begins the module's purpose"


def test_c_lines_fit_in_100_columns() -> None:
    long = [
        f"{relative(path)}:{number}: {len(line.expandtabs(8))} columns"
        for path in C_FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line.expandtabs(8)) > 100
    ]
    assert not long, "\n".join(long)


def test_c_calls_nothing_that_is_banned() -> None:
    pattern = re.compile(rf"(?<![\w.>])({'|'.join(BANNED_IN_C)})\s*\(")
    found = []
    for path in C_FILES:
        for number, line in enumerate(
            without_comments_and_strings(path.read_text()).splitlines(), 1
        ):
            if match := pattern.search(line):
                name = match.group(1)
                found.append(f"{relative(path)}:{number}: {name}(): use {BANNED_IN_C[name]}")
    assert not found, "\n".join(found)


def test_engine_and_c_know_no_front_end_words() -> None:
    files = C_FILES + sorted((REPOSITORY / "thinpool/engine").rglob("*.py"))
    pattern = re.compile(
        r"\b(containers?|docker|containerd|snapshotter|graph ?driver)\b", re.IGNORECASE
    )
    layer = re.compile(r"\bimage layers?\b|\blayer ?ids?\b", re.IGNORECASE)
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (pattern.search(line) or layer.search(line))
    ]
    assert not found, "\n".join(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    """The longest name in LAYERS that the module lies in."""
    names = [name for name in LAYERS if module == name or module.startswith(name + ".")]
    return max(names, key=len, default=None)


def own_imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= (
                {f"thinpool.{alias.name}" for alias in node.names}
                if node.module == "thinpool"
                else {node.module}
            )
    return {name for name in found if name == "thinpool" or name.startswith("thinpool.")}


def test_every_module_lies_in_a_known_layer() -> None:
    unknown = [
        module_name(path)
        for path in PYTHON_FILES
        if module_name(path) != "thinpool" and layer_of(module_name(path)) is None
    ]
    assert not unknown, f"say in LAYERS what these may import: {unknown}"


def test_imports_point_down_only() -> None:
    wrong = []
    for path in PYTHON_FILES:
        layer = layer_of(module_name(path))
        if layer is None:  # thinpool/__init__.py re-exports the API
            continue
        for name in sorted(own_imports(path)):
            target = layer_of(name) or "thinpool"
            if target != layer and target not in LAYERS[layer]:
                wrong.append(f"{relative(path)} ({layer}) imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_extension_has_one_importer() -> None:
    importers = {
        relative(path)
        for path in PYTHON_FILES
        if re.search(r"^\s*(from|import) .*\b_core\b", path.read_text(), re.MULTILINE)
    }
    assert importers <= {"thinpool/_native/__init__.py"}


def test_no_shell_and_no_dmsetup() -> None:
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in PYTHON_FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"shell\s*=\s*True|os\.system\(|[\"']dmsetup[\"']", line)
        # The benchmarks run it to measure what it costs others.
        and not ("dmsetup" in line and path.is_relative_to(REPOSITORY / "thinpool/bench"))
    ]
    assert not found, "\n".join(found)


def test_interpreters_do_not_look_for_modules_where_they_stand() -> None:
    """With -m alone the working directory comes first: anybody's folder could be root's code."""
    found = [
        f"{relative(path)}: {line.strip()}"
        for path in PYTHON_FILES
        for line in path.read_text().splitlines()
        if re.search(r"sys\.executable,\s*['\"]-[mc]['\"]", line)
    ]
    assert not found, "start it with -P:\n" + "\n".join(found)


def test_generated_document_tables_are_fresh() -> None:
    generator = REPOSITORY / "tools/gen_format_doc.py"
    result = subprocess.run(
        [sys.executable, str(generator), "--check"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_invariant_is_cited_by_a_test() -> None:
    document = REPOSITORY / "docs/crash-consistency.md"
    declared = set(
        re.findall(r"^#+ .*\b(INV-\d\d)\b|^\*\*(INV-\d\d)", document.read_text(), re.MULTILINE)
    )
    numbers = {a or b for a, b in declared}
    assert numbers, "the document declares no invariants"
    cited: set[str] = set()
    for path in [*(REPOSITORY / "tests").rglob("*.py"), *(CSRC / "tests").glob("*.c")]:
        if path != Path(__file__):
            cited |= set(re.findall(r"\bINV-\d\d\b", path.read_text()))
    assert not numbers - cited, f"no test cites {sorted(numbers - cited)}"
    assert not cited - numbers, f"tests cite what {document.name} lacks: {sorted(cited - numbers)}"


def test_documents_link_to_what_exists() -> None:
    broken = [
        f"{relative(document)}: {target}"
        for document in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")]
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)
