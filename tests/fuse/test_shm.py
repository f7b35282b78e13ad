"""The table of served volumes, as a worker that dies at any instruction leaves it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from thinpool.errors import AlreadyExistsError, BusyError, LimitError, NotFoundError, ServerError
from thinpool.model import VolumeId
from thinpool.server import control, shm
from thinpool.server.shm import TABLE_BYTES, ServedTable, ServedVolume, create_memory

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


@pytest.fixture
def memory() -> Iterator[int]:
    fd = create_memory("test", TABLE_BYTES)
    yield fd
    os.close(fd)


def volume(number: int, *, size: int = 1 << 20, generation: int = 1) -> ServedVolume:
    return ServedVolume(id=VolumeId(number), size=size, read_only=False, generation=generation)


def test_successor_finds_what_stands_there(memory: int, rng: random.Random) -> None:
    table = ServedTable(memory)
    model: dict[int, ServedVolume] = {}
    for step in range(2000):
        number = rng.randrange(200)
        if number not in model:
            model[number] = volume(number, size=512 * rng.randrange(1, 1000), generation=step)
            table.add(model[number])
        elif rng.random() < 0.5:
            table.remove(number)
            del model[number]
        else:
            size = 512 * rng.randrange(1, 1000)
            table.resize(number, size)
            model[number] = volume(number, size=size, generation=model[number].generation)
        if step % 100 == 0:  # the worker died
            table = ServedTable(memory)
        assert (number in table) == (number in model)
    assert table.entries() == [model[number] for number in sorted(model)]
    assert ServedTable(memory).entries() == table.entries()


def test_record_counts_only_when_it_is_whole(memory: int) -> None:
    table = ServedTable(memory)
    table.add(volume(7))
    with os.fdopen(os.dup(memory), "r+b", buffering=0) as file:
        file.write((0).to_bytes(4, "little"))  # died before the last store
    assert ServedTable(memory).entries() == []


def test_table_refuses_what_it_cannot_hold(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ServedTable(memory)
    table.add(volume(1))
    with pytest.raises(AlreadyExistsError):
        table.add(volume(1))
    with pytest.raises(NotFoundError):
        table.remove(2)
    with pytest.raises(NotFoundError):
        table.resize(2, 512)
    monkeypatch.setattr(table, "_free", [])
    with pytest.raises(LimitError):
        table.add(volume(2))
    assert shm.TABLE_RECORDS >= 10_000


def test_errors_survive_the_way_to_the_supervisor() -> None:
    error = BusyError("it is in use", holder=17)
    again = control.error_from_wire(control.error_to_wire(error))
    assert type(again) is BusyError
    assert again.attributes == {"holder": 17}
    unknown = control.error_from_wire({"kind": "new", "message": "?", "attributes": {}})
    assert type(unknown) is ServerError
