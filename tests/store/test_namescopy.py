"""The copy of the names: what changed is appended, and what is read is what the catalogue says."""

import json

import pytest

from tests.store.pools import MIB, record
from thinpool import errors
from thinpool.model import VolumeId
from thinpool.store import namescopy
from thinpool.store.catalogue import BUILDING, READY, Catalogue, Record
from thinpool.store.namescopy import NamesCopy, changes_path, read_copy
from thinpool.store.poolfile import PoolConfig


@pytest.fixture
def catalogue(tmp_path):
    with Catalogue(tmp_path / "catalogue.db") as catalogue:
        yield catalogue


@pytest.fixture
def config(tmp_path):
    return PoolConfig(
        name="p",
        uuid="u",
        block_size=65536,
        data=str(tmp_path / "data"),
        metadata=str(tmp_path / "metadata"),
        owns_files=True,
        created="2026-11-21T12:00:00Z",
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metadata.names.json"


def assert_copied(path, catalogue):
    document, found = read_copy(path)
    ready = {each.id: each for each in catalogue.records(READY)}
    there = {
        each.id: Record(
            **{
                **{name: getattr(each, name) for name in Record.__slots__},
                "parent": each.parent if each.parent in ready else None,
            }
        )
        for each in ready.values()
    }
    assert found == there
    return document


def test_changes_are_appended_and_read_back(catalogue, config, path):
    copy = NamesCopy(path, catalogue)
    catalogue.insert(record(0, labels={"k": "v"}))
    copy.write(config)
    assert not changes_path(path).exists()
    first = path.read_bytes()
    steps = [
        lambda: catalogue.insert(record(1, parent=VolumeId(0))),
        lambda: catalogue.insert(record(2, parent=VolumeId(1), state=BUILDING, lease="l")),
        lambda: catalogue.update(catalogue.by_id(2), state=READY, lease=None),
        lambda: catalogue.update(catalogue.by_id(0), name="another", size=2 * MIB),
        lambda: catalogue.update(catalogue.by_id(1), name="v0"),  # a name that had another owner
        lambda: catalogue.delete(0),
    ]
    for number, step in enumerate(steps):
        step()
        catalogue.put("transaction_id", str(number))
        copy.write(config)
        assert path.read_bytes() == first, "what is long is not written at every change"
        assert assert_copied(path, catalogue)["transaction_id"] == number
    before = changes_path(path).read_bytes()
    copy.write(config)
    assert changes_path(path).read_bytes() == before, "nothing changed"


def test_an_undone_change_is_not_copied(catalogue, config, path):
    copy = NamesCopy(path, catalogue)
    copy.write(config)

    def insert_twice():
        with catalogue.transaction():
            catalogue.insert(record(0))
            catalogue.insert(record(0))

    with pytest.raises(errors.ThinpoolError):
        insert_twice()
    copy.write(config)
    assert not changes_path(path).exists()
    assert_copied(path, catalogue)


def test_changes_as_long_as_the_copy_begin_anew(catalogue, config, path, monkeypatch):
    monkeypatch.setattr(namescopy, "_CHANGES_BYTES", 2000)
    copy = NamesCopy(path, catalogue)
    whole = 0
    seen = b""
    for number in range(100):
        catalogue.insert(record(number))
        copy.write(config)
        whole += path.read_bytes() != seen
        seen = path.read_bytes()
        assert_copied(path, catalogue)
    assert 3 <= whole <= 10
    copy.write(config, whole=True)
    assert not changes_path(path).exists()
    assert len(json.loads(path.read_bytes())["volumes"]) == 100


def test_a_torn_or_strange_file_of_changes_is_passed_over(catalogue, config, path):
    copy = NamesCopy(path, catalogue)
    catalogue.insert(record(0))
    copy.write(config)
    for number in (1, 2):
        catalogue.insert(record(number))
        copy.write(config)
    whole = changes_path(path).read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole)):
        changes_path(path).write_bytes(whole[:length])
        _, found = read_copy(path)
        complete = whole[:length].count(b"\n")
        assert sorted(found) == list(range(max(complete, 1)))
    changes_path(path).write_bytes(b'{"copy": "of another"}\n' + b"".join(lines[1:]))
    assert sorted(read_copy(path)[1]) == [0]


def test_a_copy_that_could_not_be_written_is_written_whole_next_time(
    catalogue, config, path, monkeypatch
):
    copy = NamesCopy(path, catalogue)
    catalogue.insert(record(0))
    copy.write(config)
    catalogue.insert(record(1))
    with monkeypatch.context() as context:
        context.setattr(namescopy.os, "open", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            copy.write(config)
    copy.write(config)
    assert_copied(path, catalogue)


def test_a_lost_catalogue_is_rebuilt_from_copy_and_changes(root, reopen, tmp_path):
    with reopen() as service:
        service.create("a", size=3 * MIB)
        service._write_copy()
        service.snapshot("a", "b")
        service.rename("a", "c")
        service._write_copy()
        directory = path_of(service)
        for name in ("metadata.names.json", "metadata.names.json.changes"):
            (tmp_path / f"kept.{name}").write_bytes((directory / name).read_bytes())
        before = {volume.name: volume for volume in service.volumes()}
    for file in directory.glob("catalogue.db*"):
        file.unlink()
    for name in ("metadata.names.json", "metadata.names.json.changes"):
        (directory / name).write_bytes((tmp_path / f"kept.{name}").read_bytes())
    with reopen() as service:
        assert {volume.name: volume for volume in service.volumes()} == before
        assert service.get("b").parent == "c"


def path_of(service):
    return service._directory
