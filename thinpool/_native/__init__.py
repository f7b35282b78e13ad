"""The C core, bound with cffi in API mode.

This is the one module that imports the extension; everything else takes ``ffi`` and ``lib`` from
here.
"""

from __future__ import annotations

from typing import Any

from thinpool._native import _core

ffi: Any = _core.ffi
lib: Any = _core.lib

__all__ = ["ffi", "lib"]
