"""Requests one by one, then many at once, then one by one: who takes them changes each time."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fuse.conftest import Server

pytestmark = pytest.mark.fuse

MIB = 1 << 20
PAGE = 4096
SIZE = 4 * MIB
PAGES = SIZE // PAGE
ROUNDS = 4
ALONE = 300  # more than it takes for the others to be sent home
THREADS = 16
EACH = 60
FEW = 150, 350  # enough for the first of the server's threads to be the only one asked
AT_ONCE = 32
PATIENCE_S = 2
SECONDS = 12
IOCB = "QIIHhIQQqQII"


def write_and_read(file: int, model: dict[int, bytes], pages: list[int], seed: int) -> None:
    """Pages that nobody else touches meanwhile: read, changed, read again."""
    chance = random.Random(seed)
    for page in pages:
        if page in model:
            assert os.pread(file, PAGE, page * PAGE) == model[page]
        model[page] = chance.randbytes(PAGE)
        assert os.pwrite(file, model[page], page * PAGE) == PAGE
        assert os.pread(file, PAGE, page * PAGE) == model[page]


@pytest.mark.parametrize("killed", [False, True])
def test_one_by_one_and_many_at_once(server: Server, *, killed: bool) -> None:
    """Also when the worker dies in the middle of each."""
    path: Path = server.volume(1, SIZE)
    chance = random.Random(1)
    models: list[dict[int, bytes]] = [{} for _ in range(THREADS)]
    file = os.open(path, os.O_RDWR)
    try:
        for turn in range(ROUNDS):
            alone = [chance.randrange(0, PAGES, THREADS) for _ in range(ALONE)]
            write_and_read(file, models[0], alone, turn)
            with ThreadPoolExecutor(THREADS) as threads:
                at_once = [
                    threads.submit(
                        write_and_read,
                        file,
                        models[number],
                        [chance.randrange(number, PAGES, THREADS) for _ in range(EACH)],
                        turn * THREADS + number,
                    )
                    for number in range(THREADS)
                ]
                if killed:
                    server.kill_worker()
                for each in at_once:
                    each.result(60)
            if killed:
                server.kill_worker()
        for model in models:
            for page, wanted in model.items():
                assert os.pread(file, PAGE, page * PAGE) == wanted
    finally:
        os.close(file)


class Reads:
    """Reads that are begun together, by io_submit(2): each into a page of its own, from there."""

    SETUP, DESTROY, GETEVENTS, SUBMIT, PREAD = 206, 207, 208, 209, 0  # of x86-64

    def __init__(self, file: int) -> None:
        self.file = file
        self.system = ctypes.CDLL(None, use_errno=True).syscall
        self.context = ctypes.c_ulong(0)
        self.call(self.SETUP, AT_ONCE, ctypes.byref(self.context))
        self.memory = mmap.mmap(-1, AT_ONCE * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        iocbs = b"".join(
            struct.pack(IOCB, 0, 0, 0, self.PREAD, 0, file, base + at, PAGE, at, 0, 0, 0)
            for at in range(0, AT_ONCE * PAGE, PAGE)
        )
        self.requests = ctypes.create_string_buffer(iocbs)
        first, size = ctypes.addressof(self.requests), struct.calcsize(IOCB)
        self.pointers = (ctypes.c_ulong * AT_ONCE)(*range(first, first + AT_ONCE * size, size))
        self.events = ctypes.create_string_buffer(32 * AT_ONCE)
        self.wait = ctypes.create_string_buffer(struct.pack("ll", PATIENCE_S, 0))

    def call(self, number: int, *arguments: object) -> int:
        found = self.system(number, *arguments)
        assert found >= 0, os.strerror(ctypes.get_errno())
        return found

    def close(self) -> None:
        self.call(self.DESTROY, self.context)

    def all_end(self, count: int) -> bool:
        """Whether that many end in time; where not, another request frees them first."""
        assert self.call(self.SUBMIT, self.context, count, self.pointers) == count
        left, in_time = count, True
        while left:
            least = ctypes.c_long(left)
            ended = self.call(self.GETEVENTS, self.context, least, least, self.events, self.wait)
            for number in range(ended):
                assert struct.unpack_from("q", self.events, 32 * number + 16) == (PAGE,)
            left -= ended
            if left:
                in_time = False
                os.fstat(self.file)
        return in_time


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="system calls by x86-64's numbers")
def test_two_that_come_together_are_both_taken(server: Server, rng: random.Random) -> None:
    """After a crowd has gone: one thread's poll is told of both, and must not leave one."""
    path: Path = server.volume(1, SIZE)
    file = os.open(path, os.O_RDWR | os.O_DIRECT)
    content = mmap.mmap(-1, SIZE)
    content[:] = rng.randbytes(SIZE)
    assert os.pwrite(file, content, 0) == SIZE
    os.fsync(file)
    reads = Reads(file)
    try:
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends:
            for _ in range(80):
                assert reads.all_end(1 + rng.randrange(3))
            for _ in range(3):
                assert reads.all_end(AT_ONCE)
            for _ in range(rng.randrange(*FEW)):
                assert reads.all_end(1)
            time.sleep(rng.random() / 500)
            assert reads.all_end(2)
    finally:
        reads.close()
        os.close(file)
