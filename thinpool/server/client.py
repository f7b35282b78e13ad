"""The client of a pool's server: light, so that a command starts fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType


class VolumeHandle(Protocol):
    """A volume open for raw I/O. Offsets and lengths are bytes, of any alignment."""

    @property
    def size(self) -> int:
        """Of the volume."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Read within the volume; what was never written is zeros."""
        ...

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer."""
        ...

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write; survives power loss after the next flush."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Whole blocks are unmapped, partial ends zeroed: all of it reads as zeros afterwards."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Unmap whole blocks within the range and leave partial ends alone."""
        ...

    def flush(self) -> None:
        """What was written before survives power loss on return."""
        ...

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """The next mapped stretch (begin, end) at or after offset, None when there is none."""
        ...

    def close(self) -> None:
        """Flush and let go. Twice is fine."""
        ...

    def __enter__(self) -> Self:
        """The handle itself."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        ...
