"""What client and server of a pool agree on. Imported by both, so it imports next to nothing.

HTTP/1.1 on ROOT/pools/POOL/server.sock. Every operation is ``POST /v1/OPERATION`` with a JSON
object of arguments, answered by ``{"result": ...}`` or by ``{"error": {"type", "message", ...}}``.
Operations that tell how far they are answer a stream of JSON documents, one a line:
``{"progress": {...}}`` any number of times, then the result or the error.

``Thinpool-Request`` names a request: asked again under the same name, what was done is answered and
not done twice. ``Thinpool-Timeout`` is how many seconds to wait for locks.

``POST /v1/lease`` answers a stream that lasts as long as the client keeps it. What was built under
the lease and not published goes when the client is gone.

A connection that begins with RAW_MAGIC instead is a raw channel: see the structs below.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION: Final = 1
PREFIX: Final = f"/v{VERSION}"
REQUEST_HEADER: Final = "Thinpool-Request"
TIMEOUT_HEADER: Final = "Thinpool-Timeout"
JSON_TYPE: Final = "application/json"
STREAM_TYPE: Final = "application/x-ndjson"
LEASE_BEAT_S: Final = 1.0
MAX_BODY: Final = 16 << 20
ENDING: Final = 503
"""The reply of a server that is about to end: nothing was done, ask the next one."""

RAW_MAGIC: Final = b"TPRW"
RAW_HELLO: Final = struct.Struct("<4sIII")
"""RAW_MAGIC, version, bytes of JSON that follow, bytes of the memfd that is passed with it.

The JSON is ``{"name", "writable", "lease", "timeout"}``. The memfd is sealed against shrinking.
"""
RAW_REQUEST: Final = struct.Struct("<IIQQ")
"""Operation, zero, offset, length: data of reads and writes stands at the start of the memfd."""
RAW_REPLY: Final = struct.Struct("<iIQQ")
"""0 or -1, bytes of JSON that follow, and two numbers: of the opening, the volume's size and its
id; of NEXT_DATA, begin and end (both the size when there is none)."""
RAW_READ: Final = 1
RAW_WRITE: Final = 2
RAW_ZERO: Final = 3
RAW_DISCARD: Final = 4
RAW_FLUSH: Final = 5
RAW_NEXT_DATA: Final = 6
RAW_CHUNK: Final = 1 << 20
RAW_CHUNK_MAX: Final = 64 << 20
RAW_JSON_MAX: Final = 1 << 16

_KINDS: Final = errors.by_kind()

HTTP_STATUS: Final[Mapping[type[errors.ThinpoolError], int]] = {
    errors.UsageError: 400,
    errors.NotPermittedError: 403,
    errors.NotFoundError: 404,
    errors.AlreadyExistsError: 409,
    errors.BusyError: 423,
    errors.NotThereYetError: 501,
    errors.UnsupportedHostError: 501,
    errors.NoSpaceError: 507,
}
"""By the nearest base class; 500 for the rest."""


def http_status(error: errors.ThinpoolError) -> int:
    """The reply's status for an error."""
    for cls in type(error).__mro__:
        if cls in HTTP_STATUS:
            return HTTP_STATUS[cls]
    return 500


def error_to_json(error: errors.ThinpoolError) -> dict[str, Any]:
    """An error as it goes over the wire, and as ``--json`` shows it."""
    return {**error.attributes, "type": error.kind, "message": error.message}


def error_from_json(data: Mapping[str, Any]) -> errors.ThinpoolError:
    """The same type again; one that a later version added is the base type."""
    cls = _KINDS.get(str(data.get("type")), errors.ThinpoolError)
    attributes = {key: value for key, value in data.items() if key not in {"type", "message"}}
    return cls(str(data.get("message", "")), **attributes)
