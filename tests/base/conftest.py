"""Block devices of the C core as the tests of this folder use them: one call, one method."""

from __future__ import annotations

from typing import Any

import pytest

from thinpool._native import ffi, lib


class CoreError(Exception):
    """A status other than TP_OK, with what the core said."""

    def __init__(self, status: int, err: Any) -> None:
        self.status = status
        self.errno = err.host_errno
        self.found = err.found
        self.wanted = err.wanted
        self.name = ffi.string(lib.tp_status_name(status)).decode()
        self.message = ffi.string(err.message).decode()
        super().__init__(f"{self.name}: {self.message}")
        assert err.status == status
        assert self.message


def check(status: int, err: Any) -> None:
    """Raise what the core reported."""
    if status:
        raise CoreError(status, err)


class Device:
    """One struct tp_bdev."""

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr

    def read(self, offset: int, length: int) -> bytes:
        err = ffi.new("struct tp_error *")
        buffer = ffi.new("unsigned char[]", max(length, 1))
        check(lib.tp_bdev_read(self.ptr, offset, buffer, length, err), err)
        return bytes(ffi.buffer(buffer, length))

    def write(self, offset: int, data: bytes) -> None:
        err = ffi.new("struct tp_error *")
        check(lib.tp_bdev_write(self.ptr, offset, data, len(data), err), err)

    def flush(self) -> None:
        err = ffi.new("struct tp_error *")
        check(lib.tp_bdev_flush(self.ptr, err), err)

    def punch(self, offset: int, length: int) -> None:
        err = ffi.new("struct tp_error *")
        check(lib.tp_bdev_punch(self.ptr, offset, length, err), err)

    def resize(self, size: int) -> None:
        err = ffi.new("struct tp_error *")
        check(lib.tp_bdev_resize(self.ptr, size, err), err)

    def next_data(self, offset: int) -> tuple[int, int]:
        err = ffi.new("struct tp_error *")
        begin, end = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.tp_bdev_next_data(self.ptr, offset, begin, end, err), err)
        return begin[0], end[0]

    @property
    def size(self) -> int:
        return lib.tp_bdev_size(self.ptr)

    @property
    def io_align(self) -> int:
        return lib.tp_bdev_io_align(self.ptr)

    @property
    def can_punch(self) -> bool:
        return bool(lib.tp_bdev_can_punch(self.ptr))

    def close(self) -> None:
        if self.ptr is not None:
            lib.tp_bdev_close(self.ptr)
            self.ptr = None


class Fault(Device):
    """A device of scripted faults."""

    def add(
        self,
        ops: int,
        kind: int,
        *,
        within: tuple[int, int] = (0, 2**64 - 1),
        nth: int = 1,
        count: int = 1,
        errno: int = 0,
        arg: int = 0,
    ) -> None:
        err = ffi.new("struct tp_error *")
        status = lib.tp_bdev_fault_add(self.ptr, ops, kind, *within, nth, count, errno, arg, err)
        check(status, err)

    def clear(self) -> None:
        lib.tp_bdev_fault_clear(self.ptr)

    @property
    def operations(self) -> int:
        return lib.tp_bdev_fault_operations(self.ptr)

    @property
    def fired(self) -> int:
        return lib.tp_bdev_fault_fired(self.ptr)


class Log(Device):
    """A device that records what is done to it."""

    @property
    def count(self) -> int:
        return lib.tp_bdev_log_count(self.ptr)

    def entry(self, index: int) -> tuple[int, int, int, int]:
        out = ffi.new("struct tp_log_entry *")
        status = lib.tp_bdev_log_entry(self.ptr, index, out)
        assert status in (0, lib.TP_E_OUT_OF_RANGE)
        if status:
            raise IndexError(index)
        return out.kind, out.device, out.offset, out.length

    def payload(self, index: int) -> bytes:
        length = self.entry(index)[3]
        buffer = ffi.new("unsigned char[]", max(length, 1))
        assert lib.tp_bdev_log_payload(self.ptr, index, buffer) == 0
        return bytes(ffi.buffer(buffer, length))

    def mark(self, number: int) -> None:
        assert lib.tp_bdev_log_mark(self.ptr, number) == 0

    def replay(self, begin: int, end: int, number: int, target: Device) -> None:
        err = ffi.new("struct tp_error *")
        check(lib.tp_bdev_log_replay(self.ptr, begin, end, number, target.ptr, err), err)


class Opener:
    """Opens devices and closes, last first, what the test left open."""

    def __init__(self) -> None:
        self.opened: list[Device] = []

    def _keep(self, status: int, out: Any, err: Any, cls: type[Any] = Device) -> Any:
        check(status, err)
        device = cls(out[0])
        self.opened.append(device)
        return device

    def file(self, path: object, flags: int = 0, create_size: int = 0) -> Device:
        out, err = ffi.new("struct tp_bdev **"), ffi.new("struct tp_error *")
        status = lib.tp_bdev_file_open(str(path).encode(), flags, create_size, out, err)
        return self._keep(status, out, err)

    def memory(self, size: int) -> Device:
        out, err = ffi.new("struct tp_bdev **"), ffi.new("struct tp_error *")
        return self._keep(lib.tp_bdev_mem_open(size, out, err), out, err)

    def fault(self, below: Device) -> Fault:
        out, err = ffi.new("struct tp_bdev **"), ffi.new("struct tp_error *")
        status = lib.tp_bdev_fault_open(below.ptr, out, err)
        return self._keep(status, out, err, Fault)

    def log(self, below: Device, order: Device | None = None, number: int = 0) -> Log:
        out, err = ffi.new("struct tp_bdev **"), ffi.new("struct tp_error *")
        order_ptr = order.ptr if order else ffi.NULL
        status = lib.tp_bdev_log_open(below.ptr, order_ptr, number, out, err)
        return self._keep(status, out, err, Log)


@pytest.fixture
def opener():
    made = Opener()
    yield made
    for device in reversed(made.opened):
        device.close()


@pytest.fixture
def core_error():
    """The exception type, which importlib mode cannot import from here."""
    return CoreError
