"""The C core, bound with cffi in API mode.

This is the one module that imports the extension; everything else takes ``ffi`` and ``lib`` from
here.
"""

from __future__ import annotations

from thinpool._native._core import ffi, lib

__all__ = ["ffi", "lib"]
