"""Where metadata is read from: a path, or a block device that is open already."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from thinpool.engine.bdev import BlockDevice
from thinpool.errors import UnsupportedHostError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Source: TypeAlias = "Path | str | BlockDevice"

NOTHING = (1 << 64) - 1
"""What the C core says for "none"."""


@contextmanager
def opened(source: Source) -> Iterator[BlockDevice]:
    """The device; one given as a path is opened read-only and closed again."""
    if isinstance(source, BlockDevice):
        yield source
        return
    with _open(source) as device:
        yield device


def _open(path: Path | str) -> BlockDevice:
    # Around the page cache: metadata is read once, and must not push out what is in use.
    try:
        return BlockDevice.open_file(path, read_only=True, direct=True)
    except UnsupportedHostError:
        return BlockDevice.open_file(path, read_only=True)


def none_if_nothing(value: int) -> int | None:
    """A number of the C core, None for "none"."""
    return None if value == NOTHING else value
