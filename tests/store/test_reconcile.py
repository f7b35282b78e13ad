"""Names and pool do not agree: each way is found and mended, and nothing is deleted for it."""

import json
import shutil

import pytest

from thinpool import errors
from thinpool.engine import Change, ChangeKind, Pool
from thinpool.store.catalogue import Catalogue, Intent
from thinpool.store.opening import open_pool
from thinpool.store.poolfile import pool_directory, read_config

MIB = 1 << 20


@pytest.fixture
def change(root):
    """Change the pool behind the catalogue's back."""

    def apply(*changes: Change) -> None:
        with open_pool(read_config(root, "p")) as found:
            tid = found.pool.status().transaction_id
            found.pool.apply(list(changes), expected=tid, new=tid + 1)

    return apply


def names(service):
    return {volume.name: volume.state for volume in service.volumes()}


def test_device_without_a_name_is_adopted_and_never_deleted(reopen, change):
    with reopen() as service:
        service.create("a", size=MIB)
    change(Change(kind=ChangeKind.CREATE, id=7))
    with reopen() as service:
        assert names(service) == {"a": "ready", "id-7": "ready"}
        assert any(each.subject == "id-7" for each in service.findings)
        assert any(each.subject == "transaction id" for each in service.findings)
        assert service.rename("id-7", "found").name == "found"
    with reopen() as service:
        assert names(service) == {"a": "ready", "found": "ready"}
        assert service.findings == []


def test_adopted_name_avoids_one_that_is_taken(reopen, change):
    with reopen() as service:
        service.create("id-7", size=MIB)
    change(Change(kind=ChangeKind.CREATE, id=7))
    with reopen() as service:
        assert set(names(service)) == {"id-7", "id-7-2"}


def test_name_without_a_device_is_missing_until_it_is_removed(reopen, change):
    with reopen() as service:
        service.create("a", size=MIB)
        identity = service.get("a").id
    change(Change(kind=ChangeKind.DELETE, id=identity))
    with reopen() as service:
        assert names(service) == {"a": "missing"}
        assert [each.remedy for each in service.doctor() if each.subject == "a"] == [
            "thinpool remove p/a"
        ]
        with pytest.raises(errors.NotFoundError):
            service.snapshot("a", "b")
        with pytest.raises(errors.AlreadyExistsError):
            service.create("a", size=MIB)
        service.remove(["a"])
        assert names(service) == {}


def test_device_that_comes_back_has_its_name_again(reopen, change):
    with reopen() as service:
        service.create("a", size=MIB)
        identity = service.get("a").id
    change(Change(kind=ChangeKind.DELETE, id=identity))
    with reopen() as service:
        assert names(service) == {"a": "missing"}
    change(Change(kind=ChangeKind.CREATE, id=identity))
    with reopen() as service:
        assert names(service) == {"a": "ready"}


def test_intent_of_another_time_is_settled_by_ids(root, reopen, change):
    with reopen() as service:
        service.create("a", size=MIB)
        tid = service.status().transaction_id
        service._catalogue.write_intent(
            Intent(
                operation="create",
                expected=tid + 5,
                new=tid + 6,
                changes=(Change(kind=ChangeKind.CREATE, id=3),),
            )
        )
    with reopen() as service:
        assert names(service) == {"a": "ready"}
        assert service._catalogue.intent() is None
        assert any(each.subject == "intent" and each.state == "wrong" for each in service.findings)
        service.create("b", size=MIB)


@pytest.mark.parametrize("made", [0, 1])
def test_snapshot_that_the_kernel_made_half_is_undone_by_the_user_engine_too(
    root, reopen, made
) -> None:
    """Engine dm died between the message and the transaction id, and the user engine comes next."""
    with reopen() as service:
        service.create("a", size=MIB)
        origin = service.get("a").id
        expected = service._pool.status().transaction_id
        change = Change(kind=ChangeKind.SNAPSHOT, id=7, origin=origin)
        intent = Intent(
            operation="snapshot", expected=expected, new=expected + 1, changes=(change,),
            insert=(), delete=(), request=None,
        )  # fmt: skip
    catalogue = Catalogue(pool_directory(root, "p") / "catalogue.db")
    catalogue.write_intent(intent)
    catalogue.close()
    with open_pool(read_config(root, "p")) as found:
        found.pool.apply([change][:made], expected=expected, new=expected)
    with reopen() as service:
        assert names(service) == {"a": "ready"}
        assert {info.id for info in service._pool.volumes()} == {origin}
        assert [each.subject for each in service.findings] == ["intent"]


def test_removal_that_the_kernel_did_half_is_finished_by_the_user_engine_too(root, reopen) -> None:
    with reopen() as service:
        for name in ("a", "b", "c"):
            service.create(name, size=MIB)
        ids = [service.get(name).id for name in ("a", "b")]
        expected = service._pool.status().transaction_id
    changes = [Change(kind=ChangeKind.DELETE, id=each) for each in ids]
    catalogue = Catalogue(pool_directory(root, "p") / "catalogue.db")
    catalogue.write_intent(
        Intent(
            operation="remove",
            expected=expected,
            new=expected + 1,
            changes=tuple(changes),
            insert=(),
            delete=tuple(ids),
            request=None,
        )
    )
    catalogue.close()
    with open_pool(read_config(root, "p")) as found:
        found.pool.apply(changes[:1], expected=expected, new=expected)
    with reopen() as service:
        assert names(service) == {"c": "ready"}
        assert len(list(service._pool.volumes())) == 1


def test_lost_catalogue_is_rebuilt_from_the_copy_beside_the_metadata(root, reopen):
    with reopen() as service:
        service.create("a", size=3 * MIB, labels={"k": "v"})
        service.snapshot("a", "b", read_only=True)
        before = {volume.name: volume for volume in service.volumes()}
    for file in pool_directory(root, "p").glob("catalogue.db*"):
        file.unlink()
    with reopen() as service:
        assert {volume.name: volume for volume in service.volumes()} == before


def test_without_a_copy_sizes_come_from_the_mappings(root, reopen):
    with reopen() as service:
        service.create("a", size=5 * MIB)
        with service.raw("a", writable=True) as volume:
            volume.write(2 * MIB, b"x")
    for pattern in ("catalogue.db*", "*.names.json"):
        for file in pool_directory(root, "p").glob(pattern):
            file.unlink()
    with reopen() as service:
        (found,) = service.volumes()
        assert (found.name, found.size) == ("id-0", 2 * MIB + 65536)
        assert found.labels == {"size": "least"}


def test_copy_of_another_pool_is_not_believed(root, reopen):
    with reopen() as service:
        service.create("a", size=MIB)
    copy = pool_directory(root, "p") / "metadata.names.json"
    document = json.loads(copy.read_text())
    document["uuid"] = "another"
    document["volumes"][0]["id"] = 9
    document["volumes"][0]["name"] = "stranger"
    copy.write_text(json.dumps(document))
    with open_pool(read_config(root, "p")) as found:
        tid = found.pool.status().transaction_id
        found.pool.apply([Change(kind=ChangeKind.CREATE, id=9)], expected=tid, new=tid + 1)
    with reopen() as service:
        assert set(names(service)) == {"a", "id-9"}


def test_copy_is_readable_by_people_and_lists_everything(root, reopen):
    with reopen() as service:
        service.create("a", size=MIB)
        service.snapshot("a", "b")
    document = json.loads((pool_directory(root, "p") / "metadata.names.json").read_text())
    assert [(v["name"], v["parent"], v["size"]) for v in document["volumes"]] == [
        ("a", None, MIB),
        ("b", "a", MIB),
    ]


def test_damaged_catalogue_says_what_to_do(root, reopen):
    with reopen() as service:
        service.create("a", size=MIB)
    catalogue = pool_directory(root, "p") / "catalogue.db"
    catalogue.write_bytes(b"not a database, by any means" * 200)
    for suffix in ("-wal", "-shm"):
        catalogue.with_name(f"catalogue.db{suffix}").unlink(missing_ok=True)
    with pytest.raises(errors.CorruptMetadataError) as caught, reopen():
        pass
    assert "move it away" in caught.value.message
    shutil.move(catalogue, root / "damaged")
    with reopen() as service:
        assert names(service) == {"a": "ready"}


def test_metadata_snapshot_that_a_dead_reader_held_is_released(root, reopen):
    with reopen() as service:
        service.create("a", size=MIB)
        with service._lock.hold(timeout=1):
            service._hold_metadata_snapshot()
        assert service._pool.status().held_root
    with reopen() as service:
        assert service._pool.status().held_root == 0


def test_metadata_snapshot_of_somebody_else_is_kept(root, reopen):
    with reopen() as service:
        assert isinstance(service._pool, Pool)
        service._pool.reserve_metadata_snapshot()
    with reopen() as service:
        assert service._pool.status().held_root
        service._pool.release_metadata_snapshot()
