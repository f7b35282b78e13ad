"""Copy-on-write block devices on the Linux kernel's dm-thin format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinpool.api import Thinpool

__all__ = ["Thinpool", "__version__"]

# Also in meson.build and pyproject.toml; a test keeps them equal. Not read from the installed
# package's metadata: that takes longer than all else that --version does.
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import the API when it is first asked for: front ends that answer --version do not."""
    if name == "Thinpool":
        from thinpool.api import Thinpool  # noqa: PLC0415 - lazily, as said above

        return Thinpool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
