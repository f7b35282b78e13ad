"""Raw I/O on a thin volume through its dm device."""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from bisect import bisect_right
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Final

from thinpool import errors
from thinpool.engine import BlockDevice
from thinpool.host.failures import failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from thinpool.model import VolumeId

_BLKDISCARD: Final = 0x1277
_BLKZEROOUT: Final = 0x127F
_SECTOR: Final = 512
_STALE_S: Final = 1.0
_EMPTY: Final = bytes(_SECTOR)


@dataclass(slots=True, kw_only=True)
class Mappings:
    """Mapped stretches of a volume, bytes, as they were at some time.

    Attributes:
        begins, ends: of each stretch, ascending; neighbours are joined.
        taken: when, by the monotonic clock.
    """

    begins: list[int]
    ends: list[int]
    taken: float

    def next(self, offset: int, size: int) -> tuple[int, int] | None:
        """The next stretch at or after an offset, within a size."""
        place = bisect_right(self.begins, offset) - 1
        if place < 0 or self.ends[place] <= offset:
            place += 1
        if place == len(self.begins) or self.begins[place] >= size:
            return None
        return max(offset, self.begins[place]), min(self.ends[place], size)


class DmVolume:
    """An open volume; implements VolumeIO. Thread-safe; offsets and lengths of any alignment.

    Data goes around the page cache, so what is read is what the device has, also where somebody
    else has it mounted.

    Args:
        volume_id: of the thin device.
        node: its block device.
        size: bytes.
        block_size: of the pool's data, bytes.
        read_only: refuse writes.
        unmapped_is_zero: there is no external origin below it.
        mappings: reads the mapped stretches.
        closed: told once when it is closed.
    """

    def __init__(
        self,
        volume_id: VolumeId,
        node: str,
        *,
        size: int,
        block_size: int,
        read_only: bool,
        unmapped_is_zero: bool,
        mappings: Callable[[], Mappings],
        resize: Callable[[int], None],
        closed: Callable[[], None],
    ) -> None:
        """Open the node."""
        self._id = volume_id
        self._node = node
        self._size = size
        self._block_size = block_size
        self._read_only = read_only
        self._unmapped_is_zero = unmapped_is_zero
        self._read_mappings = mappings
        self._resize = resize
        self._closed = closed
        self._lock = threading.Lock()
        self._mappings: Mappings | None = None
        self._device: BlockDevice | None = BlockDevice.open_file(
            node, read_only=read_only, direct=True
        )

    @property
    def id(self) -> VolumeId:
        """Of the thin device."""
        return self._id

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def _open(self) -> BlockDevice:
        device = self._device
        if device is None:
            raise errors.ClosedError(f"volume {self._id} was closed", volume_id=self._id)
        return device

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise errors.UsageError(
                f"{length} bytes at {offset} lie past the end of volume {self._id}, "
                f"which has {self._size}",
                what="offset",
                value=offset,
                size=self._size,
            )

    def _writable(self) -> BlockDevice:
        device = self._open()
        if self._read_only:
            raise errors.ReadOnlyError(f"volume {self._id} is read-only", volume_id=self._id)
        self._mappings = None
        return device

    def resize(self, size: int) -> None:
        """Set the size; what lies past a smaller one stays mapped until it is zeroed."""
        if size != self._size:
            self._resize(size)
            self._size = size
            device, self._device = self._device, None
            if device is not None:
                device.close()
            self._device = BlockDevice.open_file(self._node, read_only=self._read_only, direct=True)

    # ---- data -------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Read; what was never written is zeros."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer."""
        view = memoryview(buffer).cast("B")
        self._check(offset, len(view))
        device = self._open()
        align = device.io_align
        begin, end = offset // align * align, -(-(offset + len(view)) // align) * align
        if (begin, end) == (offset, offset + len(view)):
            if len(view):
                device.read_into(offset, view)
            return
        whole = device.read(begin, end - begin)
        view[:] = whole[offset - begin : offset - begin + len(view)]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write; survives power loss after the next flush."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        device = self._writable()
        if not len(view):
            return
        align = device.io_align
        end = offset + len(view)
        first, last = offset // align * align, -(-end // align) * align
        if (first, last) == (offset, end):
            device.write(offset, view)
            return
        with self._lock:  # of two writers to one sector, each keeps the other's bytes
            whole = bytearray(device.read(first, last - first))
            whole[offset - first : end - first] = view
            device.write(first, whole)

    def discard(self, offset: int, length: int) -> None:
        """Unmap whole blocks and leave partial ends: the kernel's discard."""
        self._check(offset, length)
        self._writable()
        begin, end = self._blocks(offset, length)
        if begin < end:
            self._ioctl(_BLKDISCARD, begin, end - begin, "discard")

    def zero(self, offset: int, length: int) -> None:
        """Unmap whole blocks and zero partial ends: all of it reads as zeros afterwards."""
        self._check(offset, length)
        self._writable()
        begin, end = self._blocks(offset, length)
        if begin < end and self._unmapped_is_zero:
            try:
                self._ioctl(_BLKDISCARD, begin, end - begin, "discard")
            except errors.UnsupportedHostError:  # the pool ignores discards
                begin = end = offset
        else:
            begin = end = offset
        if begin == end:
            self._zero_out(offset, length)
            return
        self._zero_out(offset, begin - offset)
        self._zero_out(end, offset + length - end)

    def _blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks of a range; the last block of a volume may be short."""
        block = self._block_size
        begin = -(-offset // block) * block
        end = (offset + length) // block * block
        return begin, max(begin, end)

    def _zero_out(self, offset: int, length: int) -> None:
        begin = -(-offset // _SECTOR) * _SECTOR
        end = (offset + length) // _SECTOR * _SECTOR
        if begin >= end:
            if length:
                self.write(offset, bytes(length))
            return
        if offset < begin:
            self.write(offset, _EMPTY[: begin - offset])
        self._ioctl(_BLKZEROOUT, begin, end - begin, "zero")
        if end < offset + length:
            self.write(end, _EMPTY[: offset + length - end])

    def _ioctl(self, request: int, offset: int, length: int, what: str) -> None:
        try:
            descriptor = os.open(self._node, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(descriptor, request, struct.pack("=QQ", offset, length))
            finally:
                os.close(descriptor)
        except OSError as cause:
            raise failure(
                cause, f"cannot {what} {length} bytes at {offset} of {self._node}", path=self._node
            ) from cause

    def flush(self) -> None:
        """Everything acknowledged before the call survives power loss on return."""
        self._open().flush()

    # ---- mappings ---------------------------------------------------------------------------

    def next_data(self, offset: int) -> tuple[int, int] | None:
        """The next mapped stretch (begin, end) at or after offset; None when there is none."""
        self._open()
        found = self._mappings
        if found is None or monotonic() - found.taken > _STALE_S:
            found = self._mappings = self._read_mappings()
        return found.next(offset, self._size)

    # ---- closing ----------------------------------------------------------------------------

    def close(self) -> None:
        """Let go. Twice is fine."""
        device, self._device = self._device, None
        if device is not None:
            device.close()
            self._closed()
