"""The log of intents, and what is settled after power cuts that took results (INV-23)."""

import contextlib
import os
import shutil

import pytest

from tests.store.pools import record
from thinpool import errors
from thinpool.engine import Change, ChangeKind
from thinpool.model import VolumeId
from thinpool.store import catalogue as catalogue_module
from thinpool.store import intentlog
from thinpool.store.catalogue import Catalogue, Intent
from thinpool.store.core import Caller
from thinpool.store.intentlog import RECORD_MAX, SIZE, Entry, IntentLog
from thinpool.store.poolfile import pool_directory
from thinpool.store.reconcile import settle_intent

MIB = 1 << 20
TOKEN = bytes(range(16))
BLOCK = 4096


def entries(path, token=TOKEN):
    log = IntentLog(path, token)
    log.close()
    return [(each.sequence, each.payload) for each in log.entries]


def filled(path, payloads, token=TOKEN, first=1):
    log = IntentLog(path, token)
    for number, payload in enumerate(payloads, first):
        log.append(Entry(number, 1000.0 + number, payload))
    log.close()


def test_records_are_found_again_in_their_order(tmp_path):
    path = tmp_path / "log"
    payloads = [b"{}", b"x" * 5000, b"", os.urandom(RECORD_MAX - 100)]
    filled(path, payloads)
    assert path.stat().st_size == SIZE
    assert entries(path) == list(enumerate(payloads, 1))
    filled(path, [b"more"], first=5)
    assert entries(path)[-1] == (5, b"more")
    assert entries(path, token=bytes(16)) == []


def test_writing_begins_again_where_no_more_fits_and_later_numbers_win(tmp_path):
    path = tmp_path / "log"
    log = IntentLog(path, TOKEN)
    count = SIZE // BLOCK
    for number in range(1, count + 1):
        assert log.has_room(b"a")
        log.append(Entry(number, 0.0, b"a"))
    assert not log.has_room(b"a")
    log.append(Entry(count + 1, 0.0, b"b" * 5000))
    log.close()
    found = entries(path)
    assert [number for number, _ in found] == list(range(3, count + 2))
    # The next goes behind the last, not behind the highest place.
    filled(path, [b"c"], first=count + 2)
    assert [number for number, _ in entries(path)] == list(range(4, count + 3))


def test_a_record_that_is_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "log"
    filled(path, [b"first", b"y" * 9000])
    whole = path.read_bytes()
    for torn in range(BLOCK, 4 * BLOCK, 512):
        path.write_bytes(whole[:torn] + bytes(SIZE - torn))
        found = entries(path)
        assert found == [(1, b"first")] + ([(2, b"y" * 9000)] if torn >= BLOCK + 9216 else [])
    for damaged in range(60):
        path.write_bytes(bytes([*whole[:damaged], whole[damaged] ^ 1]) + whole[damaged + 1 :])
        expected = [(2, b"y" * 9000)] if damaged < 49 else [(1, b"first"), (2, b"y" * 9000)]
        assert entries(path) == expected


def test_a_log_that_was_made_half_is_made_whole(tmp_path):
    path = tmp_path / "log"
    filled(path, [b"kept"])
    with path.open("r+b") as file:
        file.truncate(3 * BLOCK)
    assert entries(path) == [(1, b"kept")]
    assert path.stat().st_size == SIZE


# ---- the catalogue ------------------------------------------------------------------------------


def intent(number, *, new=None, request=None, **values):
    return Intent(
        **{
            "operation": "create",
            "expected": number,
            "new": new or number + 1,
            "changes": (Change(kind=ChangeKind.CREATE, id=VolumeId(number)),),
            "insert": (record(number),),
            "request": request,
            **values,
        }
    )


def power_cut(source, target, *, database):
    """The files as they may be found: the log as it is, and the database as of an earlier time."""
    target.mkdir()
    for path in database.iterdir():
        shutil.copy(path, target / path.name)
    shutil.copy(source / f"c.db{intentlog.SUFFIX}", target)
    return Catalogue(target / "c.db")


@pytest.fixture
def before(tmp_path):
    """A catalogue in which three changes were done, and its database as of before the last two."""
    home, early = tmp_path / "home", tmp_path / "early"
    home.mkdir()
    catalogue = Catalogue(home / "c.db")
    catalogue.put("transaction_id", "0")
    catalogue.write_intent(intent(0, request="r0"))
    catalogue.complete_intent(intent(0, request="r0"))
    shutil.copytree(home, early)
    yield home, early, catalogue
    catalogue.close()


class PoolAt:
    """A pool of which only the transaction is known."""

    def __init__(self, transaction_id):
        self.transaction_id = transaction_id

    def status(self):
        return self

    def volumes(self):
        return iter(())


def test_results_that_a_power_cut_took_are_recorded_again(before, tmp_path):
    home, early, catalogue = before
    for number in (1, 2):
        catalogue.write_intent(intent(number, request=f"r{number}"))
        catalogue.complete_intent(intent(number, request=f"r{number}"))
    with power_cut(home, tmp_path / "after", database=early) as found:
        assert [each.id for each in found.records()] == [0]
        assert [each.new for each in found.intents()] == [2, 3]
        assert settle_intent(found, PoolAt(3)).state == "note"
        assert [each.id for each in found.records()] == [0, 1, 2]
        assert found.get("transaction_id") == "3"
        assert found.intents() == []
        assert [found.request(f"r{number}") for number in range(3)] == [[0], [1], [2]]
        assert next(found.free_ids()) == 3
        found.write_intent(intent(3))
        found.complete_intent(intent(3))
    with Catalogue(tmp_path / "after" / "c.db") as again:
        assert again.intents() == []
        assert [again.request(f"r{number}") for number in range(3)] == [[0], [1], [2]]


def test_of_several_that_stand_the_last_is_judged_by_the_pool(before, tmp_path):
    home, early, catalogue = before
    catalogue.write_intent(intent(1))
    catalogue.complete_intent(intent(1))
    catalogue.write_intent(intent(2))  # and here the power goes
    with power_cut(home, tmp_path / "not-done", database=early) as found:
        settle_intent(found, PoolAt(2))
        assert [each.id for each in found.records()] == [0, 1]
    with power_cut(home, tmp_path / "done", database=early) as found:
        settle_intent(found, PoolAt(3))
        assert [each.id for each in found.records()] == [0, 1, 2]


def test_what_was_dropped_does_not_come_back_after_a_power_cut(before, tmp_path):
    home, early, catalogue = before
    failed = intent(1, insert=(record(7, "failed"),))
    catalogue.write_intent(failed)
    catalogue.drop_intent()
    catalogue.write_intent(intent(1))
    catalogue.complete_intent(intent(1))
    with power_cut(home, tmp_path / "after", database=early) as found:
        assert len(found.intents()) == 2
        settle_intent(found, PoolAt(2))
        assert [each.name for each in found.records()] == ["v0", "v1"]


def test_intents_of_a_pool_whose_older_metadata_came_back_are_not_believed(before, tmp_path):
    home, early, catalogue = before
    for number in (1, 2):
        catalogue.write_intent(intent(number))
        catalogue.complete_intent(intent(number))
    with power_cut(home, tmp_path / "after", database=early) as found:
        assert settle_intent(found, PoolAt(1)).state == "wrong"
        assert [each.id for each in found.records()] == [0]
        assert found.intents() == []


def test_a_catalogue_that_is_made_anew_does_not_believe_the_log_of_another(before, tmp_path):
    home, early, catalogue = before
    catalogue.write_intent(intent(1))
    for path in early.iterdir():
        path.unlink()
    with power_cut(home, tmp_path / "after", database=early) as found:
        assert found.is_new
        assert found.intents() == []


def test_an_intent_longer_than_the_log_takes_stands_in_the_database(tmp_path):
    labels = {"long": "x" * RECORD_MAX}
    big = intent(1, insert=(record(1, labels=labels),), request="big")
    path = tmp_path / "c.db"
    with Catalogue(path) as catalogue:
        catalogue.write_intent(big)
        with pytest.raises(errors.BusyError):
            catalogue.write_intent(intent(2))
    with Catalogue(path) as catalogue:
        assert catalogue.intents() == [big]
        catalogue.complete_intent(big)
        catalogue.write_intent(intent(2))
    with Catalogue(path) as catalogue:
        assert catalogue.intents() == [intent(2)]
        assert catalogue.request("big") == [1]
        assert catalogue.find("v1").labels == labels


def test_without_space_for_a_log_intents_stand_in_the_database(tmp_path, monkeypatch):
    def full(*_):
        raise errors.HostSpaceError("full", path="x")

    path = tmp_path / "c.db"
    with monkeypatch.context() as patch:
        patch.setattr(catalogue_module.intentlog, "IntentLog", full)
        with Catalogue(path) as catalogue:
            catalogue.write_intent(intent(1))
    assert not (tmp_path / f"c.db{intentlog.SUFFIX}").exists()
    with Catalogue(path) as catalogue:
        assert catalogue.intents() == [intent(1)]


def test_a_log_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    with Catalogue(tmp_path / "c.db") as catalogue:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda *_: 512)
            with pytest.raises(errors.StorageIOError):
                catalogue.write_intent(intent(1))
        assert catalogue.intents() == []
        catalogue.write_intent(intent(1, insert=(record(9, "other"),)))
        catalogue.complete_intent(catalogue.intent())
        assert [each.name for each in catalogue.records()] == ["other"]


@contextlib.contextmanager
def flush_fails(descriptor):
    """It becomes a pipe, which cannot be flushed."""
    ends = os.pipe()
    try:
        os.dup2(ends[0], descriptor)
        yield
    finally:
        for each in ends:
            os.close(each)


def test_an_intent_whose_flush_fails_stands_in_the_database(tmp_path):
    path = tmp_path / "c.db"
    with Catalogue(path) as catalogue:
        catalogue.write_intent(intent(1))
        catalogue.complete_intent(intent(1))
        flushing = catalogue.begin_intent(intent(2))
        with flush_fails(catalogue._log.fileno()):
            flushing.wait()
        assert flushing.result is True
    log = tmp_path / f"c.db{intentlog.SUFFIX}"
    log.write_bytes(bytes(SIZE))  # what was not flushed is lost
    with Catalogue(path) as catalogue:
        assert catalogue.intents() == [intent(2)]


def test_after_a_flush_that_failed_the_log_is_used_no_more(tmp_path):
    with Catalogue(tmp_path / "c.db") as catalogue:
        flushing = catalogue.begin_intent(intent(1, request="first"))
        with flush_fails(catalogue._log.fileno()):
            flushing.wait()
        catalogue.complete_intent(intent(1, request="first"))
        log = (tmp_path / f"c.db{intentlog.SUFFIX}").read_bytes()
        for number in (2, 3):
            catalogue.write_intent(intent(number, request=f"r{number}"))
            catalogue.complete_intent(intent(number, request=f"r{number}"))
        assert (tmp_path / f"c.db{intentlog.SUFFIX}").read_bytes() == log
    with Catalogue(tmp_path / "c.db") as catalogue:
        assert catalogue.intents() == []
        assert catalogue.request("first") == [1]
        assert catalogue.request("r3") == [3]


def test_an_intent_that_nothing_makes_durable_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise errors.HostSpaceError("full", path="x")

    with Catalogue(tmp_path / "c.db") as catalogue:
        flushing = catalogue.begin_intent(intent(1))
        with flush_fails(catalogue._log.fileno()), monkeypatch.context() as patch:
            patch.setattr(Catalogue, "_write_to_table", full)
            flushing.wait()
        assert flushing.result is False
        catalogue.complete_intent(intent(1), durable=True)
        assert catalogue.intents() == []


def test_more_intents_than_the_log_holds_lose_no_request(tmp_path):
    count = 2 * SIZE // BLOCK + 20
    path = tmp_path / "c.db"
    with Catalogue(path) as catalogue:
        for number in range(count):
            done = intent(number, request=f"r{number}")
            catalogue.write_intent(done)
            catalogue.complete_intent(done)
            assert catalogue.request("r0") == [0]
    with Catalogue(path) as catalogue:
        assert catalogue.intents() == []
        for number in range(count):
            assert catalogue.request(f"r{number}") == [number]


def test_what_is_kept_in_memory_is_what_was_written(tmp_path):
    with Catalogue(tmp_path / "c.db") as catalogue:
        catalogue.insert(record(1))
        catalogue.insert(record(2, parent=VolumeId(1)))
        assert catalogue.find("v2") is catalogue.by_id(2)
        renamed = catalogue.update(catalogue.by_id(2), name="other")
        assert catalogue.find("v2") is None
        assert catalogue.find("other") == catalogue.by_id(2) == renamed
        catalogue.find("v1")

        def undone():
            with catalogue.transaction():
                catalogue.update(catalogue.by_id(1), name="undone")
                assert catalogue.find("undone").id == 1
                catalogue.put("key", "undone")
                assert catalogue.get("key") == "undone"
                raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011 - our own
            undone()
        assert catalogue.find("undone") is None
        assert catalogue.find("v1") == catalogue.by_id(1) == record(1)
        assert catalogue.get("key") is None
        catalogue.delete(1)
        assert catalogue.by_id(1) is None
        assert catalogue.by_id(2).parent is None
        for number in range(10, 1000):
            catalogue.insert(record(number))
            catalogue.by_id(number)
        assert len(catalogue._known) <= 256


def test_snapshots_survive_a_power_cut_that_takes_every_unflushed_result(root, reopen, tmp_path):
    """The whole of it: the database as it was flushed last, and pool and log as they are."""
    directory = pool_directory(root, "p")
    with reopen() as service:
        service.create("a", size=MIB)
        service._catalogue.put("any", "thing")  # flushes
        flushed = tmp_path / "flushed"
        flushed.mkdir()
        for path in directory.glob("catalogue.db*"):
            if not path.name.endswith(intentlog.SUFFIX):
                shutil.copy(path, flushed / path.name)
        for number in range(5):
            service.snapshot("a", f"s{number}", caller=Caller(request=f"r{number}"))
        service.remove(["s1"], caller=Caller(request="gone"))
        log = (directory / f"catalogue.db{intentlog.SUFFIX}").read_bytes()
        wanted = {each.name: each.id for each in service.volumes()}
    for path in directory.glob("catalogue.db*"):
        path.unlink()
    for path in flushed.iterdir():
        shutil.copy(path, directory / path.name)
    (directory / f"catalogue.db{intentlog.SUFFIX}").write_bytes(log)
    for path in directory.glob("*.names.json*"):
        path.unlink()
    with reopen() as service:
        assert {each.name: each.id for each in service.volumes()} == wanted
        assert {each.id for each in service._pool.volumes()} == set(wanted.values())
        assert service.snapshot("a", "s4", caller=Caller(request="r4")).id == wanted["s4"]
        assert service.remove(["s1"], caller=Caller(request="gone")).removed == ()
