"""Run one operation on a pool, perhaps to die in the middle: ``crash_script.py ROOT OPERATION``."""

import importlib.util
import sys
from pathlib import Path

from thinpool.store import core
from thinpool.store.core import Caller
from thinpool.store.making import Publication

spec = importlib.util.spec_from_file_location(
    "store_conftest", Path(__file__).parent / "conftest.py"
)
conftest = importlib.util.module_from_spec(spec)
spec.loader.exec_module(conftest)
MIB = conftest.MIB


def create(service):
    service.create("new", size=MIB, caller=Caller(request="r1"))


def snapshot(service):
    service.snapshot("a", "new", caller=Caller(request="r1"))


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
    with conftest.opened(Path(sys.argv[1])) as opened:
        globals()[sys.argv[2]](opened)
