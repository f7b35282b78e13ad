"""The catalogue: what it keeps, refuses and survives."""

import shutil
import sqlite3

import pytest

from thinpool import errors
from thinpool.engine import VOLUME_ID_MAX, Change, ChangeKind
from thinpool.model import VolumeId
from thinpool.store.catalogue import Catalogue, Intent, Record

MIB = 1 << 20


def record(number, name=None, **values):
    return Record(
        **{
            "id": VolumeId(number),
            "name": name or f"v{number}",
            "kind": "volume",
            "parent": None,
            "size": MIB,
            "read_only": False,
            "created": "2026-11-21T12:00:00Z",
            **values,
        }
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


def test_ids_are_given_in_turn_and_reused_after_the_last(catalogue):
    assert catalogue.free_id() == 0
    catalogue.insert(record(0))
    catalogue.insert(record(1))
    catalogue.put("next_id", "1")
    assert catalogue.free_id() == 2
    assert catalogue.free_id(taken=frozenset({2, 3})) == 4
    catalogue.insert(record(VOLUME_ID_MAX))
    catalogue.put("next_id", str(VOLUME_ID_MAX))
    assert catalogue.free_id() == 2
    catalogue.put("next_id", str(VOLUME_ID_MAX + 1))
    assert catalogue.free_id() == 2


def test_catalogue_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "c.db"
    Catalogue(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(errors.UnsupportedFormatError) as caught:
        Catalogue(path)
    assert (caught.value.found, caught.value.wanted) == (99, 1)


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
