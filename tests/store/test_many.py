"""Many at once: one transaction, all or none."""

import pytest

from thinpool import errors
from thinpool.check import check_metadata
from thinpool.engine import Change, ChangeKind, PoolMode
from thinpool.server.operations import OPERATIONS, Arguments
from thinpool.store.core import ANYONE
from thinpool.store.making import SNAPSHOTS_MAX
from thinpool.store.reconcile import reconcile

MIB = 1 << 20


@pytest.fixture
def origin(service):
    service.create("a", size=MIB)
    with service.raw("a", writable=True) as volume:
        volume.write(0, b"contents of a")
    return service


def names(service):
    return {volume.name for volume in service.volumes()}


def test_a_hundred_snapshots_are_one_commit(origin):
    before = origin._pool.status()
    made = origin.snapshot_many("a", [f"c{n}" for n in range(100)], labels={"k": "v"})
    after = origin._pool.status()
    assert after.transaction_id == before.transaction_id + 1
    assert after.commits == before.commits + 1
    assert after.data_flushes == before.data_flushes + 1
    assert after.metadata_flushes == before.metadata_flushes + 2
    assert [volume.name for volume in made] == [f"c{n}" for n in range(100)]
    assert len({volume.id for volume in made}) == 100
    assert made == [origin.get(volume.name) for volume in made]
    assert all(volume.parent == "a" and volume.labels == {"k": "v"} for volume in made)
    for volume in (made[0], made[57], made[99]):
        with origin.raw(volume.name, writable=False) as raw:
            assert raw.read(0, 13) == b"contents of a"


def test_one_taken_name_leaves_none(origin):
    origin.create("c7", size=MIB)
    before = origin._pool.status()
    with pytest.raises(errors.AlreadyExistsError):
        origin.snapshot_many("a", [f"c{n}" for n in range(10)])
    assert names(origin) == {"a", "c7"}
    assert origin._pool.status() == before


@pytest.mark.parametrize("targets", [[], ["x", "y", "x"], [str(n) for n in range(1001)]])
def test_what_cannot_be_one_transaction_is_refused(origin, targets):
    with pytest.raises(errors.UsageError):
        origin.snapshot_many("a", targets)
    assert names(origin) == {"a"}


def test_a_full_metadata_device_takes_a_series_whole_or_not_at_all(tmp_path, make_pool, opened):
    """However near to full, a series either fits or is refused: it never fails half way."""
    make_pool(tmp_path, metadata_size=2 * MIB)
    with opened(tmp_path) as service:
        service.create("a", size=MIB)
        with service.raw("a", writable=True) as volume:
            volume.write(0, b"contents of a")
        refused = None
        made = 1
        for round_number in range(100):
            targets = [f"c{round_number}.{n}" for n in range(SNAPSHOTS_MAX)]
            try:
                service.snapshot_many("a", targets)
            except errors.MetadataSpaceError as error:
                refused = error
                break
            made += len(targets)
        assert refused is not None
        assert service._pool.status().mode is PoolMode.RW
        assert len(names(service)) == made
        with service.stable_metadata():
            assert check_metadata(service.metadata_device).clean
        service.remove(["c0.0"])  # what frees space works


def test_several_are_described_in_the_order_asked(origin):
    origin.snapshot_many("a", ["z", "y", "x"])
    assert [volume.name for volume in origin.get_many(["y", "a", "z"])] == ["y", "a", "z"]
    with pytest.raises(errors.NotFoundError):
        origin.get_many(["y", "nope"])


def test_a_list_as_documents_says_what_each_volume_says_of_itself(origin):
    origin.snapshot("a", "image", read_only=True, labels={"k": 'v "\u00e4"'})
    origin.snapshot("image", "c")
    origin.snapshot_many("c", ["d", "e"])
    origin.open_lease("l")
    hidden = origin.create(None, size=MIB, lease="l")
    origin.snapshot(hidden.name, "of-hidden", lease="l")
    lost = origin.create("lost", size=MIB, filesystem="ext4")
    origin.remove(["c"])
    now = origin._pool.status().transaction_id
    delete = Change(kind=ChangeKind.DELETE, id=lost.id)
    origin._pool.apply([delete], expected=now, new=now)
    reconcile(origin._catalogue, origin._pool)
    wanted = [volume.to_json() for volume in origin.volumes()]
    assert {each["state"] for each in wanted} == {"ready", "missing"}
    assert origin.documents() == wanted
    assert OPERATIONS["list"](origin, Arguments({}), ANYONE) == wanted
    alone = OPERATIONS["list"](origin, Arguments({"exclusive": True}), ANYONE)
    assert all(each["exclusive"] is not None for each in alone if each["state"] == "ready")
