"""A worker does nothing before the I/O of the one before it has ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path

from thinpool.engine import BlockDevice
from thinpool.server.worker import wait_for_last_io


def waiting_thread(path: Path) -> tuple[threading.Thread, threading.Event]:
    """A successor that waits for its turn, and whether it came."""
    turn = threading.Event()

    def wait() -> None:
        wait_for_last_io(str(path))
        turn.set()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, turn


def descriptor_of(path: Path) -> int:
    """Of this process, on a file."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            if link.readlink() == path:
                return int(link.name)
    raise AssertionError(f"{path} is not open")


def test_successor_waits_while_any_reference_to_the_data_is_left(tmp_path: Path) -> None:
    """INV-19: closing is not enough while something, like I/O in flight, holds the description."""
    path = tmp_path / "data"
    device = BlockDevice.open_file(path, create_size=1 << 20, shared_lock=True)
    held = os.dup(descriptor_of(path))
    thread, turn = waiting_thread(path)
    assert not turn.wait(0.2)
    device.close()
    assert not turn.wait(0.2)
    os.close(held)
    assert turn.wait(10)
    thread.join()


def test_successor_lets_the_data_go_again(tmp_path: Path) -> None:
    """INV-19: the lock was only for the moment; the successor then takes its own."""
    path = tmp_path / "data"
    path.write_bytes(bytes(4096))
    wait_for_last_io(str(path))
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)
