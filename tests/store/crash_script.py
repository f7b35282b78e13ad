"""Run one operation on a pool, perhaps to die in the middle: ``crash_script.py ROOT OPERATION``."""

import sys
from pathlib import Path

# A program of its own: last, so that thinpool is the one that is installed, where one is.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from tests.store.pools import MIB, opened
from thinpool.store import core, intentlog
from thinpool.store.core import Caller
from thinpool.store.making import Publication


def create(service):
    service.create("new", size=MIB, caller=Caller(request="r1"))


def snapshot(service):
    service.snapshot("a", "new", caller=Caller(request="r1"))


def snapshot_answered(service):
    service.snapshot("a", "new", caller=Caller(request="r1", settles=True))
    service.settle()


def snapshot_with_full_log(service):
    service._catalogue._log._next = intentlog.SIZE // 4096
    snapshot(service)


def snapshot_many(service):
    service.snapshot_many("a", ["new", "new2", "new3"], caller=Caller(request="r1"))


def remove(service):
    service.remove(["a", "b"], caller=Caller(request="r1"))


def remove_big(service):
    core._BIG_DELETE_BLOCKS = 0
    service.remove(["a", "b"], caller=Caller(request="r1"))


def build(service):
    service.open_lease("lease1")
    made = service.snapshot("a", None, lease="lease1", kind="image")
    service.publish(
        [
            Publication(
                name=made.name,
                publish_as="new",
                kind="image",
                read_only=True,
                labels={"k": "v"},
                filesystem=None,
            )
        ],
        lease="lease1",
        caller=Caller(request="r1"),
    )


if __name__ == "__main__":
    with opened(Path(sys.argv[1])) as service:
        globals()[sys.argv[2]](service)
