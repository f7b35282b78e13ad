"""Diff, Changes, DiffSize and ApplyDiff: faithful, consistent, streamed, and safe to interrupt."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import tarfile
import threading
import time
from pathlib import Path

import pytest

from tests.graphdriver.kit import MIB, RefusedError, a_driver, eventually, tar_of
from tests.oci.trees import state

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.ext4]


@pytest.fixture
def names(driver):
    """Ids for a test; the layers are gone afterwards."""
    found = ["below", "one", "two", "three"]
    yield found
    for layer in reversed(found):
        driver.remove(layer)
    assert driver.mounted() == set()
    assert driver.volumes() == {"base"}


def below(driver):
    """A layer with one of everything."""
    driver.create("below")
    where = driver.get("below")
    for name in ("etc", "etc/deep", "usr", "var", "gone", "gone/sub"):
        (where / name).mkdir()
    for number in range(30):
        (where / f"usr/f{number}").write_bytes(b"%d" % number * 500)
    for name in ("etc/a", "etc/b", "etc/deep/c", "gone/x", "gone/sub/y", "var/file"):
        (where / name).write_text(name)
    (where / "link").symlink_to("etc/a")
    os.link(where / "etc/a", where / "etc/hard")
    driver.put("below")


def change(where):
    """Every kind of change; what Docker is to list."""
    (where / "etc/a").write_text("changed")  # has a second name
    (where / "etc/b").unlink()
    (where / "etc/deep/new").mkdir()
    (where / "etc/deep/new/file").write_bytes(b"x" * 100_000)
    (where / "usr/f1").chmod(0o4711)
    os.chown(where / "usr/f2", 1234, 4321)
    os.utime(where / "usr/f3", (1, 1))
    os.setxattr(where / "usr/f4", "user.note", b"text")
    (where / "usr/f5").rename(where / "usr/moved")
    (where / "usr/f6").unlink()
    (where / "usr/f6").mkdir()
    os.mknod(where / "usr/device", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    os.mkfifo(where / "usr/fifo")
    os.link(where / "etc/deep/new/file", where / "usr/linked")
    with (where / "sparse").open("wb") as file:
        file.truncate(100 * MIB)
        file.seek(50 * MIB)
        file.write(b"middle")
    for path in ("gone/sub/y", "gone/x"):
        (where / path).unlink()
    (where / "gone/sub").rmdir()
    (where / "gone").rmdir()
    (where / "link").unlink()
    (where / "link").symlink_to("etc/b")
    (where / os.fsdecode(b"caf\xe9")).write_text("not UTF-8")


LISTED = {
    ("/etc", "M"), ("/etc/a", "M"), ("/etc/hard", "M"), ("/etc/b", "D"), ("/etc/deep", "M"),
    ("/etc/deep/new", "A"), ("/etc/deep/new/file", "A"), ("/usr", "M"), ("/usr/f1", "M"),
    ("/usr/f2", "M"), ("/usr/f3", "M"), ("/usr/f4", "M"), ("/usr/f5", "D"), ("/usr/moved", "A"),
    ("/usr/f6", "M"), ("/usr/device", "A"), ("/usr/fifo", "A"), ("/usr/linked", "A"),
    ("/sparse", "A"), ("/gone", "D"), ("/link", "M"),
}  # fmt: skip


def tree(where):
    """All but the root's own entry, whose time is not in a layer."""
    found = state(where)
    del found[b""]
    return found


@pytest.mark.parametrize("mounted", [True, False])
def test_changes_and_a_diff_that_makes_the_same_tree(driver, names, mounted):
    below(driver)
    driver.create("one", "below")
    where = driver.get("one")
    change(where)
    wanted = tree(where)
    if not mounted:
        driver.put("one")
    listed = driver.changes("one", "below")
    assert {each for each in listed if "caf" not in each[0]} == LISTED
    assert len(listed) == len(LISTED) + 1
    tar = driver.diff("one", "below")
    assert b"GNU.sparse" not in tar  # Docker could not put the image together again
    driver.create("two", "below")
    driver.apply("two", "below", tar)
    assert tree(driver.get("two")) == wanted
    assert driver.changes("two", "below") == listed
    assert (driver.get("two") / "sparse").stat().st_blocks * 512 < MIB
    assert driver.diff("two", "below") == tar  # a diff is deterministic


def test_unchanged_layer_has_no_changes(driver, names):
    below(driver)
    driver.create("one", "below")
    assert driver.changes("one", "below") == []
    assert driver.size("one", "below") == 0
    with tarfile.open(fileobj=io.BytesIO(driver.diff("one", "below"))) as tar:
        assert tar.getnames() == []


def test_size_counts_added_and_changed_files(driver, names):
    below(driver)
    driver.create("one", "below")
    where = driver.get("one")
    (where / "etc/b").write_bytes(b"x" * 1000)
    (where / "fresh").write_bytes(b"x" * 234)
    (where / "usr/f1").unlink()
    os.link(where / "fresh", where / "twice")  # is counted once
    (where / "soft").symlink_to("fresh")
    assert driver.size("one", "below") == 1234 + len("fresh")


def test_without_a_parent_it_is_the_whole_tree(driver, names):
    below(driver)
    listed = driver.changes("below", "")
    assert ("/etc/deep/c", "A") in listed
    assert {kind for _, kind in listed} == {"A"}
    driver.create("one")
    driver.apply("one", "", driver.diff("below"))
    assert tree(driver.get("one")) == tree(driver.get("below"))


def test_compared_with_one_further_below(driver, names):
    below(driver)
    driver.create("one", "below")
    (driver.get("one") / "first").write_text("1")
    driver.put("one")
    driver.create("two", "one")
    (driver.get("two") / "second").write_text("2")
    assert driver.changes("two", "below") == [("/first", "A"), ("/second", "A")]
    assert driver.changes("two", "one") == [("/second", "A")]
    assert driver.changes("below", "two") == [("/first", "D"), ("/second", "D")]


def test_diff_of_a_layer_that_is_written_to_is_of_one_instant(driver, names):
    driver.create("one")
    where = driver.get("one")
    ended = threading.Event()

    def write():
        number = 0
        while not ended.is_set():
            number += 1
            (where / f"a{number}").write_text(str(number))
            (where / f"b{number}").write_text(str(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.5)
        with tarfile.open(fileobj=io.BytesIO(driver.diff("one"))) as tar:
            found = {name.removeprefix("./") for name in tar.getnames()}
    finally:
        ended.set()
        writer.join()
    made = sum(name.startswith("a") for name in found)
    assert made
    # b follows a: at one instant at most one a is without its b, and none is missing between.
    assert made - sum(name.startswith("b") for name in found) in (0, 1)
    assert {f"a{number}" for number in range(1, made + 1)} <= found


def test_layer_larger_than_any_buffer_passes_in_constant_memory(driver, names):
    def peak():
        text = Path(f"/proc/{driver.process.pid}/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    driver.layer("below", small=b"x")
    before = peak()
    size = 300 * MIB

    def body():
        member = tarfile.TarInfo("large")
        member.size = size
        yield member.tobuf()
        for number in range(size // MIB):
            yield number.to_bytes(8, "big") * (MIB // 8)
        yield bytes(1024)

    driver.create("one", "below")
    status, answer = driver.request(
        "/GraphDriver.ApplyDiff?id=one&parent=below", body(), {"Transfer-Encoding": "chunked"}
    )
    assert (status, json.loads(answer)) == (200, {"Size": size})
    with tarfile.open(fileobj=io.BytesIO(driver.diff("one", "below"))) as tar:
        assert [(each.name, each.size) for each in tar] == [("large", size)]
    assert peak() - before < 64 * MIB


# ---- cut off ------------------------------------------------------------------------------


def send_half(driver, layer):
    """Begin an ApplyDiff with a member of which half is sent; the open socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(driver.socket))
    half = tar_of({"file": b"x" * MIB})[: MIB // 2]
    sock.sendall(
        b"POST /GraphDriver.ApplyDiff?id=%b&parent= HTTP/1.1\r\nHost: d\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (layer.encode(), len(half), half)
    )
    return sock


def test_layer_whose_tar_is_cut_off_is_gone(driver, names):
    driver.create("one")
    send_half(driver, "one").close()
    eventually(lambda: not driver.exists("one"))
    driver.layer("one", file=b"whole")  # and can be made again
    assert (driver.get("one") / "file").read_bytes() == b"whole"


def test_layer_half_filled_by_a_driver_that_was_killed_is_gone(driver, names):
    driver.create("one")
    with send_half(driver, "one"):
        eventually(lambda: driver.api.list("p")[-1].device is not None)
        time.sleep(0.2)
        driver.kill()
    driver.start()
    assert not driver.exists("one")
    assert driver.volumes() == {"base"}


def test_layer_is_not_a_parent_while_it_is_filled(driver, names):
    driver.create("one")
    with send_half(driver, "one"):
        eventually(lambda: driver.api.list("p")[-1].device is not None)
        with pytest.raises(RefusedError, match="being filled"):
            driver.create("two", "one")
    eventually(lambda: not driver.exists("one"))


@pytest.mark.parametrize("junk", [b"junk" * 1000, b"\0" * 511, tar_of({"a": b"b"})[:700]])
def test_what_is_no_tar_is_refused(driver, names, junk):
    driver.create("one")
    with pytest.raises(RefusedError) as refused:
        driver.apply("one", "", junk)
    assert "Traceback" not in str(refused.value)
    assert not driver.exists("one")


def test_apply_to_a_layer_of_another_parent_is_refused(driver, names):
    driver.layer("below", a=b"a")
    driver.create("one", "below")
    with pytest.raises(RefusedError, match="not made on two"):
        driver.apply("one", "two", tar_of({}))
    assert driver.exists("one")


# ---- full ---------------------------------------------------------------------------------


def test_pool_that_fills_is_an_error_and_takes_nothing_else_along():
    with a_driver(size=192 * MIB, when_full="error", min_free=0) as driver:
        driver.layer("image", ballast=os.urandom(60 * MIB))
        driver.create("container", "image")
        where = driver.get("container")
        (where / "before").write_text("before")
        driver.create("large", "image")
        with pytest.raises(RefusedError, match=r"space|full"):
            driver.apply("large", "image", tar_of({"large": os.urandom(200 * MIB)}))
        assert not driver.exists("large")
        (where / "after").write_text("after")
        fd = os.open(where, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        assert (where / "ballast").stat().st_size == 60 * MIB
        driver.put("container")
        driver.remove("container")
        driver.remove("image")
        driver.layer("next", ballast=os.urandom(100 * MIB))
        assert driver.status()["Pool Mode"] == "rw"
