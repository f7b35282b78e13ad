"""The server dies between any two steps: what is found then is the old or the new (INV-23)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from thinpool.check import check_metadata
from thinpool.errors import BusyError, HostSpaceError
from thinpool.store import service as service_module
from thinpool.store.catalogue import BUILDING, DELETING
from thinpool.store.core import Caller
from thinpool.store.opening import open_pool
from thinpool.store.poolfile import read_config

MIB = 1 << 20
SCRIPT = Path(__file__).parent / "crash_script.py"
STEPS = ("before-intent", "intent-written", "intent-flushed", "applied", "recorded")


def run(root, operation, step=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if step is not None:
        environment["THINPOOL_CRASH_AT"] = step
    done = subprocess.run(
        [sys.executable, SCRIPT, str(root), operation],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    wanted = -signal.SIGKILL if step is not None else 0
    assert done.returncode == wanted, done.stderr


def names(service):
    return {volume.name for volume in service.volumes()}


def assert_agrees(service):
    """Names and ids are one to one, nothing is under way, and the metadata is clean."""
    catalogue, pool = service._catalogue, service._pool
    assert catalogue.intent() is None
    assert {record.id for record in catalogue.records()} == {info.id for info in pool.volumes()}
    assert not catalogue.records(DELETING)
    assert int(catalogue.get("transaction_id")) == pool.status().transaction_id
    with service.stable_metadata():
        report = check_metadata(service.metadata_device)
    assert report.clean, report


@pytest.fixture
def with_two(root, reopen):
    with reopen() as service:
        service.create("a", size=MIB)
        with service.raw("a", writable=True) as volume:
            volume.write(0, b"contents of a")
        service.snapshot("a", "b")
    return root


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("operation", ["create", "snapshot"])
def test_making_is_done_or_not_and_can_be_asked_again(with_two, reopen, operation, step):
    run(with_two, operation, step)
    with reopen() as service:
        assert_agrees(service)
        done = step in {"applied", "recorded"}
        assert names(service) == {"a", "b"} | ({"new"} if done else set())
        # The client asks again under the same name of the request.
        if operation == "create":
            volume = service.create("new", size=MIB, caller=Caller(request="r1"))
        else:
            volume = service.snapshot("a", "new", caller=Caller(request="r1"))
        assert volume.name == "new"
        assert names(service) == {"a", "b", "new"}
        assert_agrees(service)
        if operation == "snapshot":
            with service.raw("new", writable=False) as raw:
                assert raw.read(0, 13) == b"contents of a"


@pytest.mark.parametrize("step", ["intent-flushed", "applied", "answered", "recorded"])
def test_snapshot_that_was_answered_before_it_was_recorded_is_there(with_two, reopen, step):
    run(with_two, "snapshot_answered", None if step == "recorded" else step)
    with reopen() as service:
        assert_agrees(service)
        done = set() if step == "intent-flushed" else {"new"}
        assert names(service) == {"a", "b"} | done
        made = service.snapshot("a", "new", caller=Caller(request="r1"))
        with service.raw("new", writable=False) as raw:
            assert raw.read(0, 13) == b"contents of a"
        assert service.get("new").id == made.id
        assert_agrees(service)


def test_what_is_asked_for_between_an_answer_and_its_record_sees_it(with_two, reopen):
    later = Caller(request="r1", settles=True)
    with reopen() as service:
        catalogue = service._catalogue
        made = service.snapshot("a", "new", caller=later)
        assert catalogue._due is not None
        assert service.get("new") == made
        assert catalogue._due is None
        for number, look in enumerate(
            (
                lambda: names(service),
                lambda: service.status().volumes,
                lambda: service.snapshot("a", "new", caller=later),
                lambda: service.remove(["new3"]),
                lambda: service.rename("new4", "other"),
                lambda: service.create("next", size=MIB, caller=Caller(settles=True)),
                service.settle,
            )
        ):
            service.snapshot("a", f"new{number}", caller=Caller(request=f"q{number}", settles=True))
            look()
            service.settle()
            assert catalogue.by_id(made.id) is not None
            assert_agrees(service)
        kept = {"a", "b", "new", "new0", "new1", "new2", "new5", "new6", "other", "next"}
        assert names(service) == kept


def test_result_that_cannot_be_recorded_yet_is_recorded_later(with_two, reopen, monkeypatch):
    with reopen() as service:
        catalogue = service._catalogue
        made = service.snapshot("a", "new", caller=Caller(request="r1", settles=True))

        def full(_):
            raise HostSpaceError("full", path="x")

        with monkeypatch.context() as patch:
            patch.setattr(catalogue, "insert", full)
            with pytest.raises(HostSpaceError):
                service.settle()
            assert service.get("a").name == "a"
            with pytest.raises(HostSpaceError):
                service.rename("a", "other")
        assert service.get("new") == made
        assert_agrees(service)


@pytest.mark.parametrize("step", ["log-emptied", *STEPS])
def test_snapshot_that_begins_the_log_of_intents_anew_is_done_or_not(with_two, reopen, step):
    run(with_two, "snapshot_with_full_log", step)
    with reopen() as service:
        assert_agrees(service)
        done = {"new"} if step in {"applied", "recorded"} else set()
        assert names(service) == {"a", "b"} | done
        assert service.snapshot("a", "new", caller=Caller(request="r1")).name == "new"
        assert_agrees(service)


@pytest.mark.parametrize("step", STEPS)
def test_many_snapshots_are_all_there_or_none_and_can_be_asked_again(with_two, reopen, step):
    run(with_two, "snapshot_many", step)
    wanted = {"new", "new2", "new3"}
    with reopen() as service:
        assert_agrees(service)
        done = step in {"applied", "recorded"}
        assert names(service) == {"a", "b"} | (wanted if done else set())
        made = service.snapshot_many("a", ["new", "new2", "new3"], caller=Caller(request="r1"))
        assert [volume.name for volume in made] == ["new", "new2", "new3"]
        assert names(service) == {"a", "b"} | wanted
        assert_agrees(service)
        for name in wanted:
            with service.raw(name, writable=False) as raw:
                assert raw.read(0, 13) == b"contents of a"


@pytest.mark.parametrize("step", STEPS)
def test_removing_takes_all_or_nothing(with_two, reopen, step):
    run(with_two, "remove", step)
    with reopen() as service:
        assert_agrees(service)
        assert names(service) == (set() if step in {"applied", "recorded"} else {"a", "b"})
        service.remove([*names(service)], caller=Caller(request="r1"))
        assert names(service) == set()


@pytest.mark.parametrize("step", ["removal-decided", *STEPS])
def test_big_removal_is_finished_once_it_was_decided(with_two, reopen, step, monkeypatch):
    run(with_two, "remove_big", step)
    with reopen() as service:
        assert names(service) == set()
        service._finish_removals()
        assert_agrees(service)
        assert service.status().data.used == 0
        assert service.remove(["a"], caller=Caller(request="r1")).removed == ()


@pytest.mark.parametrize("step", STEPS)
def test_what_was_being_built_goes_when_its_client_does_not_come_back(
    with_two, reopen, step, monkeypatch
):
    monkeypatch.setattr(service_module, "LEASE_GRACE_S", 0.0)
    run(with_two, "build", step)
    with reopen() as service:
        service._expire_leases()
        assert names(service) == {"a", "b"}
        assert not service._catalogue.records(BUILDING)
        assert_agrees(service)


def test_what_was_being_built_stays_for_a_client_that_comes_back(with_two, reopen):
    run(with_two, "build", "applied")
    with reopen() as service:
        service.open_lease("lease1")
        service._expire_leases()
        assert len(service._catalogue.records(BUILDING)) == 1
        assert names(service) == {"a", "b"}


def test_script_without_a_crash_does_it_all(with_two, reopen):
    run(with_two, "build")
    with reopen() as service:
        assert names(service) == {"a", "b", "new"}
        assert service.get("new").labels == {"k": "v"}
        assert service.get("new").read_only
        assert_agrees(service)


def test_second_opener_is_told_that_the_pool_is_busy(root, reopen):
    with reopen(), pytest.raises(BusyError):
        open_pool(read_config(root, "p"), exclusive=True)
