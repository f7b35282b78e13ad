"""A FUSE server of one file over another, run as a program by tests that then kill it.

Usage: tiny_fuse.py FD FILE: FD is an open /dev/fuse that the caller has mounted (linux/fuse.h).
The root directory holds the one file "id-1".
"""

from __future__ import annotations

import errno
import os
import struct
import sys

HEADER = struct.Struct("<IIQQIIII")
LOOKUP, GETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT = (
    *(1, 3, 14, 15, 16, 17, 18, 20, 25, 26),
)
FORGET, BATCH_FORGET = 2, 42
FILE = 2


def attributes(node: int, size: int) -> bytes:
    """Struct fuse_attr."""
    mode = 0o100600 if node == FILE else 0o40700
    return struct.pack(
        "<QQQ3Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
    )


def answer(code: int, node: int, body: bytes, file: int) -> bytes:  # noqa: PLR0911 - a table
    """The body of the reply; OSError for a refusal."""
    size = os.fstat(file).st_size
    if code == INIT:
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 64, 48, 1 << 17, 1, 32, 0, 0)
    if code == LOOKUP:
        if body.rstrip(b"\0") != b"id-1":
            raise OSError(errno.ENOENT, "")
        return struct.pack("<QQQQII", FILE, 0, 60, 60, 0, 0) + attributes(FILE, size)
    if code == GETATTR:
        return struct.pack("<QII", 60, 0, 0) + attributes(node, size)
    if code == OPEN:
        return struct.pack("<QII", 1, 1, 0)
    if code == READ:
        _handle, offset, length = struct.unpack_from("<QQI", body)
        return os.pread(file, length, offset)
    if code == WRITE:
        _handle, offset, length = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(file, body[40 : 40 + length], offset), 0)
    if code == STATFS:
        return struct.pack("<QQQQQIIII24x", 1 << 20, 1 << 20, 1 << 20, 8, 8, 4096, 255, 4096, 0)
    if code in (FSYNC, FLUSH, RELEASE):
        return b""
    raise OSError(errno.ENOSYS, "")


def serve(fuse: int, file: int) -> None:
    """Answer until unmounted."""
    while True:
        request = os.read(fuse, (1 << 17) + 4096)
        _length, code, unique, node, *_rest = HEADER.unpack_from(request)
        if code in (FORGET, BATCH_FORGET):
            continue
        try:
            body, error = answer(code, node, request[HEADER.size :], file), 0
        except OSError as cause:
            body, error = b"", -(cause.errno or errno.EIO)
        os.write(fuse, struct.pack("<IiQ", 16 + len(body), error, unique) + body)


if __name__ == "__main__":
    serve(int(sys.argv[1]), os.open(sys.argv[2], os.O_RDWR))
