"""A tree as a value, so that two can be compared and a canary be shown untouched."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def state(root: Path, *, closed: bytes | None = None) -> dict[bytes, dict[str, Any]]:
    """Everything observable below ``root``, by relative name; hard links by their first name.

    The directory ``closed`` is named and not looked into.
    """
    found: dict[bytes, dict[str, Any]] = {}
    first_names: dict[int, bytes] = {}
    top = os.fsencode(root)

    def visit(path: bytes, name: bytes) -> None:
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        entry: dict[str, Any] = {
            "mode": oct(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mtime": status.st_mtime_ns,
            "xattrs": {
                attribute: os.getxattr(path, attribute, follow_symlinks=False)
                for attribute in os.listxattr(path, follow_symlinks=False)
            },
        }
        if kind == stat.S_IFREG:
            with open(path, "rb") as file:  # noqa: PTH123 - bytes names
                entry["content"] = hashlib.file_digest(file, "sha256").hexdigest()
            entry["size"] = status.st_size
        elif kind == stat.S_IFLNK:
            entry["target"] = os.readlink(path)  # noqa: PTH115 - bytes names
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            entry["device"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if kind != stat.S_IFDIR:
            entry["same as"] = first_names.setdefault(status.st_ino, name)
        found[name] = entry
        if kind == stat.S_IFDIR and name != closed:
            for child in sorted(os.listdir(path)):  # noqa: PTH208 - bytes names
                visit(path + b"/" + child, name + b"/" + child if name else child)

    visit(top, b"")
    return found
