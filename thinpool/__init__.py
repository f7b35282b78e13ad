"""Copy-on-write block devices on the Linux kernel's dm-thin format."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinpool.api import Thinpool

__all__ = ["Thinpool"]


def __getattr__(name: str) -> object:
    """Import the API when it is first asked for: front ends that answer --version do not."""
    if name == "Thinpool":
        from thinpool.api import Thinpool  # noqa: PLC0415 - lazily, as said above

        return Thinpool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
