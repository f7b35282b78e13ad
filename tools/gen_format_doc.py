"""Write the tables of docs/on-disk-format.md from the declarations in thinpool.format.

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands the generated table of that record; the
words around are written by hand. Usage: gen_format_doc.py [--check]; with --check nothing is
written, and the exit code is 1 where a table is stale.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinpool.format import RECORDS

if TYPE_CHECKING:
    from thinpool.format import Record

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENT = REPOSITORY / "docs" / "on-disk-format.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(record: Record[Any]) -> str:
    """A record as Markdown."""
    lines = ["| offset | size | field | unit | meaning |", "|---|---|---|---|---|"]
    lines += [
        f"| {offset:#05x} | {field.size} | `{field.name}` | {field.unit} | {field.meaning} |"
        for offset, field in record.offsets()
    ]
    return "\n".join(lines) + f"\n\n{record.size} bytes.\n"


def generate(text: str) -> str:
    """The document with its tables anew."""
    records = {record.name: record for record in RECORDS}
    shown = [name for _, name, _ in TABLE.findall(text)]
    if missing := records.keys() - set(shown):
        raise SystemExit(f"{DOCUMENT} has no place for {', '.join(sorted(missing))}")
    if unknown := set(shown) - records.keys():
        raise SystemExit(f"{DOCUMENT} wants unknown records {', '.join(sorted(unknown))}")
    return TABLE.sub(lambda match: f"{match[1]}{table(records[match[2]])}{match[3]}", text)


def main() -> int:
    """Write, or look."""
    text = DOCUMENT.read_text()
    fresh = generate(text)
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(fresh)
        return 0
    if fresh != text:
        print(f"{DOCUMENT}: tables are stale: run tools/gen_format_doc.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
