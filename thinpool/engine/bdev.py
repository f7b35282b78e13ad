"""Block devices of the C core: files, memory, and two that stand in front of another for tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, Self

from thinpool._native import ffi, lib
from thinpool.engine.handle import Handle
from thinpool.engine.status import check, new_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READ_ONLY = 1
DIRECT = 2
EXCLUSIVE = 4
CREATE = 8
SHARED_LOCK = 16

FOR_EVER = 0
ANYWHERE = (1 << 64) - 1


class BlockDevice(Handle):
    """Any block device. Offsets and lengths are bytes, multiples of ``io_align``."""

    def __init__(self, pointer: Any, *, what: str, above: tuple[Handle, ...] = ()) -> None:  # noqa: ANN401 - cffi's data has no type
        """Use open_file and the like instead."""
        super().__init__(pointer, lib.tp_bdev_close, above=above, what=what)
        self.name = what

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - as above
        lib.tp_bdev_close(pointer)

    @classmethod
    def open_file(
        cls,
        path: Path | str,
        *,
        read_only: bool = False,
        direct: bool = False,
        exclusive: bool = False,
        shared_lock: bool = False,
        create_size: int | None = None,
    ) -> Self:
        """Open a file or a block device.

        Args:
            path: where it is.
            read_only: refuse writes.
            direct: bypass the page cache.
            exclusive: lock it (flock, and O_EXCL of a block device).
            shared_lock: hold a shared flock until the last I/O has ended.
            create_size: make a sparse file of so many bytes.

        Raises:
            BusyError: exclusive, and somebody holds it.
            ForeignDataError: create_size, and it exists.
            NotFoundError, NotPermittedError, StorageIOError: as the host says.
        """
        flags = (
            (READ_ONLY if read_only else 0)
            | (DIRECT if direct else 0)
            | (EXCLUSIVE if exclusive else 0)
            | (SHARED_LOCK if shared_lock else 0)
            | (CREATE if create_size is not None else 0)
        )
        opened = ffi.new("struct tp_bdev **")
        err = new_error()
        status = lib.tp_bdev_file_open(str(path).encode(), flags, create_size or 0, opened, err)
        check(status, err, path=str(path))
        return cls(opened[0], what=str(path))

    @classmethod
    def open_memory(cls, size: int) -> Self:
        """A device of zeros in memory."""
        opened = ffi.new("struct tp_bdev **")
        err = new_error()
        check(lib.tp_bdev_mem_open(size, opened, err), err)
        return cls(opened[0], what=f"memory of {size} bytes")

    @property
    def size(self) -> int:
        """Bytes."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_bdev_size(pointer))

    @property
    def io_align(self) -> int:
        """What offsets and lengths are multiples of."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_bdev_io_align(pointer))

    def read(self, offset: int, length: int) -> bytes:
        """Read."""
        buffer = bytearray(length)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the buffer."""
        with (
            self.in_call() as (pointer, err),
            ffi.from_buffer("unsigned char[]", buffer, require_writable=True) as data,
        ):
            check(lib.tp_bdev_read(pointer, offset, data, len(data), err), err)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write; durable after a flush."""
        with (
            self.in_call() as (pointer, err),
            ffi.from_buffer("unsigned char[]", data) as source,
        ):
            check(lib.tp_bdev_write(pointer, offset, source, len(source), err), err)

    def flush(self) -> None:
        """Make everything written before durable."""
        with self.in_call() as (pointer, err):
            check(lib.tp_bdev_flush(pointer, err), err)

    def punch(self, offset: int, length: int) -> None:
        """Deallocate; reads as zeros afterwards.

        Raises:
            UnsupportedHostError: that cannot be promised here.
        """
        with self.in_call() as (pointer, err):
            check(lib.tp_bdev_punch(pointer, offset, length, err), err)

    def resize(self, size: int) -> None:
        """Set the size of a file or of memory."""
        with self.in_call() as (pointer, err):
            check(lib.tp_bdev_resize(pointer, size, err), err)


class FaultKind(IntEnum):
    """What a scripted fault does."""

    ERROR = 1
    TORN = 2
    DROP_FLUSH = 3
    MISDIRECT = 4
    BIT_FLIP = 5
    LOST_WRITE = 6
    HOLD = 7


class FaultOp(IntFlag):
    """What a scripted fault does it to."""

    READ = 1
    WRITE = 2
    FLUSH = 4
    PUNCH = 8


class FaultDevice(BlockDevice):
    """Scripted faults in front of another device."""

    @classmethod
    def over(cls, below: BlockDevice) -> Self:
        """Put one in front of a device, which stays open until this one is closed."""
        opened = ffi.new("struct tp_bdev **")
        with below.in_call() as (pointer, err):
            check(lib.tp_bdev_fault_open(pointer, opened, err), err)
        return cls(opened[0], what=f"faults over {below.name}", above=(below,))

    def add(
        self,
        kind: FaultKind,
        ops: FaultOp,
        *,
        begin: int = 0,
        end: int = ANYWHERE,
        nth: int = 1,
        count: int = 1,
        host_errno: int = 5,
        arg: int = 0,
    ) -> None:
        """Add a rule; the first that matches acts.

        Args:
            kind: what happens.
            ops: to which operations.
            begin: of the range that must be touched, bytes.
            end: of it.
            nth: at which matching operation from now, 1 being the next.
            count: how often in all, FOR_EVER for always.
            host_errno: of an error.
            arg: bytes written of a torn write, the shift of a misdirected one, a bit's number.
        """
        with self.in_call() as (pointer, err):
            status = lib.tp_bdev_fault_add(
                pointer, int(ops), int(kind), begin, end, nth, count, host_errno, arg, err
            )
            check(status, err)

    def clear(self) -> None:
        """Drop every rule."""
        with self.in_call() as (pointer, _):
            lib.tp_bdev_fault_clear(pointer)

    @property
    def operations(self) -> int:
        """Seen so far."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_bdev_fault_operations(pointer))

    @property
    def fired(self) -> int:
        """How often a rule acted."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_bdev_fault_fired(pointer))

    @property
    def held(self) -> int:
        """Operations that wait for a release now."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_bdev_fault_held(pointer))

    def release(self) -> None:
        """Let every held operation go on."""
        with self.in_call() as (pointer, _):
            lib.tp_bdev_fault_release(pointer)


class LogKind(IntEnum):
    """What a log entry records."""

    WRITE = 1
    FLUSH = 2
    PUNCH = 3
    MARK = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One entry, in the order of completion.

    The number of a mark stands in ``offset``. That of a flush is an index: the flush made durable
    the entries of its device below it; any others before it completed while it ran.
    """

    kind: LogKind
    device: int
    offset: int
    length: int
    payload: bytes


class LogDevice(BlockDevice):
    """Records every write, punch and flush in front of another device."""

    @classmethod
    def over(
        cls, below: BlockDevice, *, order: LogDevice | None = None, device_number: int = 0
    ) -> Self:
        """Put one in front of a device.

        Args:
            below: stays open until this one is closed.
            order: another log device whose log this one shares, so that there is one order.
            device_number: of this device in the log.
        """
        opened = ffi.new("struct tp_bdev **")
        above: tuple[Handle, ...] = (below,)
        with below.in_call() as (pointer, err):
            if order is None:
                status = lib.tp_bdev_log_open(pointer, ffi.NULL, device_number, opened, err)
                check(status, err)
            else:
                above = (below, order)
                with order.in_call() as (order_pointer, _):
                    status = lib.tp_bdev_log_open(
                        pointer, order_pointer, device_number, opened, err
                    )
                    check(status, err)
        return cls(opened[0], what=f"log over {below.name}", above=above)

    def __len__(self) -> int:
        """How many entries."""
        with self.in_call() as (pointer, _):
            return int(lib.tp_bdev_log_count(pointer))

    def __bool__(self) -> bool:
        """A log is a log though it is empty."""
        return True

    def entry(self, index: int) -> LogEntry:
        """One entry with its payload."""
        entry = ffi.new("struct tp_log_entry *")
        with self.in_call() as (pointer, _):
            check(lib.tp_bdev_log_entry(pointer, index, entry))
            payload = b""
            if entry.kind == LogKind.WRITE:
                buffer = bytearray(entry.length)
                with ffi.from_buffer("unsigned char[]", buffer, require_writable=True) as data:
                    check(lib.tp_bdev_log_payload(pointer, index, data))
                payload = bytes(buffer)
        return LogEntry(
            kind=LogKind(entry.kind),
            device=int(entry.device),
            offset=int(entry.offset),
            length=int(entry.length),
            payload=payload,
        )

    def __iter__(self) -> Iterator[LogEntry]:
        """All entries in order."""
        for index in range(len(self)):
            yield self.entry(index)

    def replay(self, target: BlockDevice, *, begin: int, end: int, device_number: int = 0) -> None:
        """Do the writes and punches of one device again.

        Args:
            target: to which device.
            begin: the first entry.
            end: the entry after the last.
            device_number: whose; entries of others are passed over.
        """
        with self.in_call() as (pointer, err), target.in_call() as (onto, _):
            check(lib.tp_bdev_log_replay(pointer, begin, end, device_number, onto, err), err)

    def mark(self, number: int) -> None:
        """Record that everything numbered up to this was acknowledged before here."""
        with self.in_call() as (pointer, _):
            check(lib.tp_bdev_log_mark(pointer, number))
