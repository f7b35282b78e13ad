"""The catalogue: what it keeps, refuses and survives."""

import contextlib
import itertools
import os
import random
import shutil
import sqlite3
import subprocess
import sys

import pytest

from tests.store.pools import record
from thinpool import errors
from thinpool.engine import VOLUME_ID_MAX, Change, ChangeKind
from thinpool.model import VolumeId
from thinpool.store.catalogue import (
    BUILDING,
    DELETING,
    MISSING,
    READY,
    VERSION,
    Catalogue,
    Intent,
    PersistentRecord,
    _of_states,
)


@pytest.fixture
def catalogue(tmp_path):
    with Catalogue(tmp_path / "c.db") as catalogue:
        yield catalogue


def test_records_survive_reopening(tmp_path):
    with Catalogue(tmp_path / "c.db") as catalogue:
        assert catalogue.is_new
        catalogue.insert(record(1, labels={"chain-id": "sha256:1"}))
        catalogue.insert(record(2, parent=VolumeId(1), kind="image", read_only=True))
    with Catalogue(tmp_path / "c.db") as catalogue:
        assert not catalogue.is_new
        assert [each.id for each in catalogue.records()] == [1, 2]
        assert catalogue.find("v2") == record(2, parent=VolumeId(1), kind="image", read_only=True)
        assert [each.id for each in catalogue.by_label("chain-id", "sha256:1")] == [1]
        assert catalogue.by_label("chain-id", "sha256:2") == []


def test_children_of_a_deleted_volume_have_no_parent(catalogue):
    catalogue.insert(record(1))
    catalogue.insert(record(2, parent=VolumeId(1)))
    catalogue.delete(1)
    assert catalogue.by_id(2).parent is None


def test_what_is_known_of_names_is_what_the_table_has(tmp_path, monkeypatch):
    """Random changes, also undone ones, with more names than are kept in memory, and reopening."""
    monkeypatch.setattr("thinpool.store.catalogue._NAMES_MAX", 12)
    monkeypatch.setattr("thinpool.store.catalogue._KNOWN_MAX", 3)
    seed = random.randrange(1 << 32)
    sys.stdout.write(f"seed {seed}\n")
    generator = random.Random(seed)
    names = [f"n{number}" for number in range(20)]
    wanted: dict[str, int] = {}
    catalogue = Catalogue(tmp_path / "c.db")
    kept = set()
    for step in range(600):
        name = generator.choice(names)
        taken = wanted.get(name)
        with contextlib.suppress(KeyError), catalogue.transaction():
            after = dict(wanted)
            if taken is None and len(wanted) < generator.choice([3, 9]):
                after[name] = step
                catalogue.insert(record(step, name=name))
            elif taken is not None and generator.random() < 0.5:
                catalogue.delete(after.pop(name))
            elif taken is not None and (new := generator.choice(names)) not in wanted:
                after[new] = after.pop(name)
                catalogue.update(catalogue.by_id(taken), name=new)
            if generator.random() < 0.2:
                raise KeyError(name)  # undone
            wanted = after
        kept.add(catalogue._maybe_taken is not None)
        if generator.random() < 0.05:
            catalogue.close()
            catalogue = Catalogue(tmp_path / "c.db")
        found = {each: catalogue.find(each) for each in names}
        assert {each: row.id for each, row in found.items() if row is not None} == wanted
    catalogue.close()
    assert kept == {True, False}


def test_names_are_unique_and_a_failed_write_changes_nothing(catalogue):
    catalogue.insert(record(1, name="a"))

    def both():
        with catalogue.transaction():
            catalogue.insert(record(2, name="b"))
            catalogue.insert(record(3, name="a"))

    with pytest.raises(errors.ThinpoolError):
        both()
    assert [each.name for each in catalogue.records()] == ["a"]


def test_one_intent_at_a_time(catalogue):
    intent = Intent(
        operation="create",
        expected=1,
        new=2,
        changes=(
            Change(kind=ChangeKind.CREATE, id=VolumeId(5)),
            Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(6), origin=VolumeId(5)),
        ),
        insert=(record(5), record(6, parent=VolumeId(5))),
        request="r",
    )
    catalogue.write_intent(intent)
    assert catalogue.intent() == intent
    with pytest.raises(errors.ThinpoolError):
        catalogue.write_intent(intent)
    catalogue.complete_intent(intent)
    assert catalogue.intent() is None
    assert catalogue.request("r") == [5, 6]
    assert [each.id for each in catalogue.records()] == [5, 6]
    assert catalogue.get("transaction_id") == "2"


def first_ids(catalogue, count):
    return list(itertools.islice(catalogue.free_ids(), count))


def test_ids_are_given_in_turn_and_reused_after_the_last(catalogue):
    assert first_ids(catalogue, 2) == [0, 1]
    catalogue.insert(record(0))
    catalogue.insert(record(1))
    catalogue.put("next_id", "1")
    assert first_ids(catalogue, 3) == [2, 3, 4]
    catalogue.insert(record(VOLUME_ID_MAX))
    catalogue.put("next_id", str(VOLUME_ID_MAX - 1))
    assert first_ids(catalogue, 3) == [VOLUME_ID_MAX - 1, 2, 3]
    catalogue.put("next_id", str(VOLUME_ID_MAX + 1))
    assert first_ids(catalogue, 1) == [2]


def test_no_id_is_given_twice_when_the_known_gap_is_short(catalogue):
    for taken in (0, 1, 2, 3, 4, 7, VOLUME_ID_MAX):
        catalogue.insert(record(taken))
    catalogue.put("next_id", "5")
    assert first_ids(catalogue, 1) == [5]
    assert first_ids(catalogue, 4) == [5, 6, 8, 9]
    catalogue.insert(record(5))
    catalogue.put("next_id", "6")
    assert first_ids(catalogue, 3) == [6, 8, 9]
    catalogue.put("next_id", str(VOLUME_ID_MAX - 1))
    found = first_ids(catalogue, 4)
    assert found == [VOLUME_ID_MAX - 1, 6, 8, 9]
    assert first_ids(catalogue, 4) == found


def test_ids_are_found_between_many_that_are_taken(catalogue):
    taken = [*range(300), *range(301, 500)]
    with catalogue.transaction():
        for volume_id in taken:
            catalogue.insert(record(volume_id))
    assert first_ids(catalogue, 3) == [300, 500, 501]


def test_volumes_are_counted_and_found_by_their_states(catalogue):
    for volume_id, state in enumerate((READY, BUILDING, READY, DELETING, MISSING)):
        catalogue.insert(record(volume_id, state=state))
    assert catalogue.count(READY, MISSING) == 3
    assert catalogue.count(BUILDING) == 1
    assert catalogue.count() == 5
    assert [each.id for each in catalogue.records(READY, MISSING)] == [0, 2, 4]
    assert [each.id for each in catalogue.records(BUILDING, DELETING)] == [1, 3]


def test_looking_for_the_unfinished_does_not_read_every_volume(catalogue):
    where, values = _of_states([BUILDING])
    query = f"EXPLAIN QUERY PLAN SELECT * FROM volumes WHERE {where}"  # noqa: S608 - text of our own
    plan = catalogue._rows(query, values)
    assert "volumes_by_state" in plan[0]["detail"]


def test_activations_are_not_flushed_but_kept_by_a_dying_process(tmp_path):
    """They describe devices, which a power cut ends; a server that is killed must find them."""
    script = """
import os, sys
from thinpool.store.catalogue import ActivationRecord, Catalogue, Record
catalogue = Catalogue(sys.argv[1])
catalogue.insert(Record(id=3, name="v", kind="volume", parent=None, size=512, read_only=False,
                        created="2026-11-21T12:00:00Z"))
os.write(1, b"begin")
[generation] = catalogue.next_generations(1)
catalogue.put_activations([ActivationRecord(id=3, read_only=False, generation=generation, loop=7,
                                            sequence=9, by_mount=False)])
os.write(1, b"end")
os.kill(os.getpid(), 9)
"""
    path = tmp_path / "c.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    trace = tmp_path / "trace"
    command = [sys.executable, "-c", script, str(path)]
    if shutil.which("strace"):
        command = ["strace", "-f", "-o", str(trace), "-e", "trace=fsync,fdatasync,write", *command]
    subprocess.run(command, env=environment, check=False, capture_output=True, timeout=60)
    with Catalogue(path) as catalogue:
        [found] = catalogue.activations()
        assert (found.loop, found.generation) == (7, 1)
        assert list(catalogue.next_generations(2)) == [2, 3]
    if trace.exists():
        between = trace.read_text().split('"begin"')[1].split('"end"')[0]
        assert "sync" not in between


def test_catalogue_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "c.db"
    Catalogue(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(errors.UnsupportedFormatError) as caught:
        Catalogue(path)
    assert (caught.value.found, caught.value.wanted) == (99, VERSION)


def test_catalogue_of_the_first_version_keeps_its_volumes_and_learns_to_persist(tmp_path):
    path = tmp_path / "c.db"
    with Catalogue(path) as catalogue:
        catalogue.insert(record(3, "v"))
    with sqlite3.connect(path) as db:
        db.executescript("DROP TABLE persistent; PRAGMA user_version = 1;")
    db.close()
    with Catalogue(path) as catalogue:
        assert catalogue.persistent() == []
        wanted = PersistentRecord(id=VolumeId(3), read_only=True, settings={"mode": 0o640})
        catalogue.put_persistent(wanted)
        assert catalogue.persistent() == [wanted]
        assert catalogue.find("v").id == 3
        catalogue.delete(3)
        assert catalogue.persistent() == []


def test_server_that_died_while_it_reserved_space_is_survived(tmp_path):
    path = tmp_path / "c.db"
    with Catalogue(path) as catalogue:
        catalogue.put("reserve", "x" * 100)
    with Catalogue(path) as catalogue:
        assert catalogue.get("reserve") is None


def test_copy_taken_while_it_is_open_holds_everything_that_was_recorded(tmp_path):
    with Catalogue(tmp_path / "c.db") as catalogue:
        for number in range(50):
            catalogue.insert(record(number))
            if number == 30:  # a crash: the files as they are
                copy = tmp_path / "copy"
                copy.mkdir()
                for path in tmp_path.glob("c.db*"):
                    shutil.copy(path, copy / path.name)
    with Catalogue(copy / "c.db") as found:
        assert len(found.records()) == 31


def test_log_never_grows_past_what_was_reserved(tmp_path):
    with Catalogue(tmp_path / "c.db") as catalogue:
        size = (tmp_path / "c.db-wal").stat().st_size
        for number in range(400):
            catalogue.insert(record(number))
        assert (tmp_path / "c.db-wal").stat().st_size == size
