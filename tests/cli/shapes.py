"""The shapes that other programs rely on, as data, and a judge of documents.

A shape is a type, a set of allowed values, a list ``[shape]``, a dict of fields, a tuple of
alternatives, or a compiled pattern. Fields may be added to documents, never left out.
"""

from __future__ import annotations

import re
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
NULL = None

VOLUME: dict[str, Any] = {
    "pool": NAME,
    "name": NAME,
    "id": int,
    "kind": {"base", "image", "container", "volume"},
    "parent": (NAME, NULL),
    "size": int,
    "mapped": int,
    "exclusive": (int, NULL),
    "read_only": bool,
    "created": TIME,
    "device": (re.compile("/.+"), NULL),
    "mounts": [re.compile("/.*")],
}
STATUS: dict[str, Any] = {
    "schema": {1},
    "pool": NAME,
    "uuid": str,
    "engine": {"user", "dm"},
    "mode": {"rw", "ro", "out_of_data_space", "fail"},
    "needs_check": bool,
    "transaction_id": int,
    "block_size": int,
    "data": {
        "path": str,
        "used": int,
        "total": int,
        "low_water": int,
        "host_free": (int, NULL),
    },
    "metadata": {"path": str, "used": int, "total": int},
    "when_full": {"queue", "error"},
    "volumes": int,
    "active": int,
}
MADE: dict[str, Any] = {"schema": {1}, "volume": VOLUME}
ACTIVATION: dict[str, Any] = {
    "schema": {1},
    "volume": VOLUME,
    "device": (re.compile("/.+"), NULL),
    "number": (re.compile(r"\d+:\d+"), NULL),
    "file": (re.compile("/.+"), NULL),
    "already_active": bool,
}
FINDING: dict[str, Any] = {
    "subject": str,
    "state": {"ok", "note", "missing", "wrong"},
    "message": str,
    "remedy": (str, NULL),
}

SHAPES: dict[str, Any] = {
    "create-pool": STATUS,
    "attach-pool": STATUS,
    "detach-pool": {"schema": {1}, "pool": NAME, "detached": {True}},
    "pools": {"schema": {1}, "pools": [STATUS]},
    "status": STATUS,
    "set": STATUS,
    "extend-pool": STATUS,
    "remove-pool": {"schema": {1}, "pool": NAME, "removed": {True}},
    "create": MADE,
    "import": MADE,
    "snapshot": MADE,
    "commit": MADE,
    "activate": ACTIVATION,
    "resume": {"schema": {1}, "activations": [ACTIVATION], "failures": list},
    "install": {"schema": {1}, "written": [re.compile("/.+")]},
    "deactivate": MADE,
    "mount": {
        "schema": {1},
        "volume": VOLUME,
        "device": re.compile("/.+"),
        "directory": re.compile("/.*"),
        "already_mounted": bool,
    },
    "umount": MADE,
    "list": {"schema": {1}, "volumes": [VOLUME]},
    "remove": {"schema": {1}, "removed": [VOLUME], "freed": int, "dry_run": bool},
    "rename": MADE,
    "resize": MADE,
    "trim": {"schema": {1}, "volume": VOLUME, "trimmed": int},
    "diff": {
        "schema": {1},
        "left": str,
        "right": str,
        "changes": [{"path": str, "change": {"added", "modified", "deleted"}}],
    },
    "delta": {
        "schema": {1},
        "left": str,
        "right": str,
        "block_size": int,
        "ranges": [
            {"begin": int, "length": int, "change": {"left_only", "right_only", "different"}}
        ],
    },
    "export": {"schema": {1}, "volume": VOLUME, "output": (str, NULL), "written": int},
    "check": {
        "schema": {1},
        "pool": (NAME, NULL),
        "clean": bool,
        "transaction_id": (int, NULL),
        "faults": [
            {
                "type": str,
                "severity": {"fatal", "leak", "note"},
                "structure": str,
                "block": (int, NULL),
                "device_id": (int, NULL),
                "message": str,
            }
        ],
    },
    "doctor": {"schema": {1}, "healthy": bool, "host": [FINDING], "pools": dict},
}
ERROR: dict[str, Any] = {"error": {"type": re.compile("[a-z_]+"), "message": re.compile(".+")}}


def problems(document: Any, shape: Any, at: str = "$") -> list[str]:
    """Where a document departs from a shape; nothing when it does not."""
    if isinstance(shape, dict):
        return _object_problems(document, shape, at)
    if isinstance(shape, list):
        if not isinstance(document, list):
            return [f"{at}: {document!r} is no array"]
        return [
            problem
            for index, each in enumerate(document)
            for problem in problems(each, shape[0], f"{at}[{index}]")
        ]
    if isinstance(shape, tuple):
        fits = any(not problems(document, each, at) for each in shape)
    else:
        fits = _fits(document, shape)
    return [] if fits else [f"{at}: {document!r} is not {shape}"]


def _object_problems(document: Any, shape: dict[str, Any], at: str) -> list[str]:
    if not isinstance(document, dict):
        return [f"{at}: {document!r} is no object"]
    found = [f"{at}.{key}: left out" for key in shape if key not in document]
    for key, inner in shape.items():
        if key in document:
            found += problems(document[key], inner, f"{at}.{key}")
    return found


def _fits(document: Any, shape: Any) -> bool:
    if shape is NULL:
        return document is None
    if isinstance(shape, re.Pattern):
        return isinstance(document, str) and shape.fullmatch(document) is not None
    if isinstance(shape, set):
        return any(document == each and type(document) is type(each) for each in shape)
    return type(document) is shape  # bool is an int to isinstance
