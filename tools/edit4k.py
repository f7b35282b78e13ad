"""Change 4 KiB inside a file, make it durable, and print how long that took in milliseconds.

open, one pwrite at OFFSET, fsync, close: what a database or a virtual machine's image does, and
what makes overlayfs copy the whole file first. Usage: edit4k.py FILE OFFSET
"""

from __future__ import annotations

import os
import sys
import time


def main() -> None:
    """Edit and report."""
    path, offset = sys.argv[1], int(sys.argv[2])
    data = os.urandom(4096)
    begin = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY)
    os.pwrite(descriptor, data, offset)
    os.fsync(descriptor)
    os.close(descriptor)
    print(f"{(time.perf_counter() - begin) * 1000:.2f} ms")


if __name__ == "__main__":
    main()
