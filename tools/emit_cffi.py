"""Write the C source of thinpool._native._core from csrc/include/thinpool/abi.h.

The declarations between each pair of cffi marks go to cdef as they stand; the compiler gets the
same header by #include. Usage: emit_cffi.py ABI_HEADER OUTPUT.c
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

BEGIN = "/* cffi: begin */"
END = "/* cffi: end */"


def declarations(header: Path) -> str:
    """The text between the marks, without comments (old cdefs take none inside enums)."""
    text = header.read_text()
    parts = []
    end = 0
    while (begin := text.find(BEGIN, end)) >= 0:
        end = text.index(END, begin)
        parts.append(text[begin + len(BEGIN) : end])
    return re.sub(r"/\*.*?\*/", "", "".join(parts), flags=re.DOTALL)


def main() -> None:
    """Emit the wrapper."""
    header, output = Path(sys.argv[1]), Path(sys.argv[2])
    ffi = FFI()
    ffi.cdef(declarations(header))
    ffi.set_source("thinpool._native._core", '#include "thinpool/abi.h"\n')
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main()
