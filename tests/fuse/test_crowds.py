"""Requests one by one, then many at once, then one by one: who takes them changes each time."""

from __future__ import annotations

import os
import random
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
