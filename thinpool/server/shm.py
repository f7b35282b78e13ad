"""Memory that the supervisor keeps while workers come and go.

Three memfds: the FUSE server's request slots, the engine's redo log, and the table of volumes that
are served, so that a successor can bring their files back before it opens the catalogue. The
supervisor only holds them; a worker may be killed between any two stores to them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Final

from thinpool.errors import AlreadyExistsError, LimitError, NotFoundError
from thinpool.model import VolumeId

REDO_BYTES: Final = 4 << 20
TABLE_RECORDS: Final = 1 << 15

_FREE: Final = 0
_USED: Final = 1


def create_memory(name: str, size: int) -> int:
    """A memfd of zeros, to be inherited."""
    fd = os.memfd_create(f"thinpool-{name}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


class _Record(ctypes.Structure):
    """One served volume; ``state`` is stored last when it is added and first when removed."""

    _fields_ = (
        ("state", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("read_only", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("generation", ctypes.c_uint64),
    )


TABLE_BYTES: Final = TABLE_RECORDS * ctypes.sizeof(_Record)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVolume:
    """A volume that has a file.

    Attributes:
        id: of the volume.
        size: bytes.
        read_only: served so.
        generation: differs between activations of one volume.
    """

    id: VolumeId
    size: int
    read_only: bool
    generation: int


class ServedTable:
    """The served volumes, in shared memory. Not thread-safe: its owner serialises.

    Args:
        fd: a memfd of TABLE_BYTES bytes.
    """

    def __init__(self, fd: int) -> None:
        """Map it and find out what stands in it."""
        self._map = mmap.mmap(fd, TABLE_BYTES)
        self._records = (_Record * TABLE_RECORDS).from_buffer(self._map)
        self._used: dict[int, int] = {}
        self._free: list[int] = []
        for index in range(TABLE_RECORDS - 1, -1, -1):
            record = self._records[index]
            if record.state == _USED:
                self._used[record.id] = index
            else:
                self._free.append(index)

    def entries(self) -> list[ServedVolume]:
        """What is served, by id."""
        return [self[volume_id] for volume_id in sorted(self._used)]

    def __getitem__(self, volume_id: int) -> ServedVolume:
        """One of them; KeyError."""
        record = self._records[self._used[volume_id]]
        return ServedVolume(
            id=VolumeId(record.id),
            size=record.size,
            read_only=bool(record.read_only),
            generation=record.generation,
        )

    def __contains__(self, volume_id: int) -> bool:
        """Whether it is served."""
        return volume_id in self._used

    def add(self, volume: ServedVolume) -> None:
        """Add one.

        Raises:
            AlreadyExistsError: it stands there.
            LimitError: the table is full.
        """
        if volume.id in self._used:
            raise AlreadyExistsError(f"volume {volume.id} is served already", existing=volume.id)
        if not self._free:
            raise LimitError(
                f"{TABLE_RECORDS} volumes are active: deactivate one first", limit=TABLE_RECORDS
            )
        index = self._free.pop()
        record = self._records[index]
        record.id = volume.id
        record.read_only = int(volume.read_only)
        record.size = volume.size
        record.generation = volume.generation
        record.state = _USED
        self._used[volume.id] = index

    def resize(self, volume_id: int, size: int) -> None:
        """Change the size of one; NotFoundError."""
        self._record(volume_id).size = size

    def remove(self, volume_id: int) -> None:
        """Remove one; NotFoundError."""
        self._record(volume_id).state = _FREE
        self._free.append(self._used.pop(volume_id))

    def clear(self) -> None:
        """Remove all."""
        for volume_id in list(self._used):
            self.remove(volume_id)

    def _record(self, volume_id: int) -> _Record:
        try:
            return self._records[self._used[volume_id]]
        except KeyError:
            raise NotFoundError(f"volume {volume_id} is not served", volume_id=volume_id) from None

    def close(self) -> None:
        """Unmap it; the contents stay."""
        self._records = (_Record * 0)()
        self._map.close()
