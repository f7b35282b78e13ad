"""Changes found through the block delta: the same as those of a walk of both trees, and sooner."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import time

import pytest

from tests.graphdriver.kit import a_driver
from thinpool.host import ext4
from thinpool.oci.diff import iter_changes

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.ext4]

FILES = 100_000


@contextlib.contextmanager
def opened(*paths):
    fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in paths]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def walked(driver, layer, parent):
    """What a walk of both mounted trees says."""
    kinds = {"modified": "M", "added": "A", "deleted": "D"}
    with opened(driver.get(parent), driver.get(layer)) as (before, after):
        found = iter_changes(before, after, related=True, parents=True)
        listed = [(f"/{os.fsdecode(each.path)}", kinds[each.kind]) for each in found if each.path]
    driver.put(parent)
    driver.put(layer)
    return listed


def many(count, *, in_each=100):
    """A layer's tar with so many files, in directories of two levels."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(count):
            if number % in_each == 0:
                index = number // in_each
                for name in (f"d{index // 30}", f"d{index // 30}/s{index}"):
                    member = tarfile.TarInfo(name)
                    member.type, member.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(member)
            member = tarfile.TarInfo(f"{name}/f{number}")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"small"))
    return stream.getvalue()


def disturb(where, rng, count):  # noqa: C901 - a list of cases
    """Random changes of every kind in a tree."""
    for step in range(count):
        files = [f"{top}/{name}" for top, _, names in os.walk(where) for name in names]
        directories = [top for top, _, _ in os.walk(where)]
        path, other = rng.choice(files), rng.choice(directories)
        match rng.randrange(10):
            case 0:
                with open(path, "ab") as file:  # noqa: PTH123 - a plain path
                    file.write(b"more")
            case 1:
                os.chmod(path, 0o600 + rng.randrange(8))  # noqa: PTH101
            case 2:
                os.unlink(path)  # noqa: PTH108
            case 3:
                with open(f"{other}/new{step}", "wb") as file:  # noqa: PTH123
                    file.write(b"new")
            case 4:
                os.mkdir(f"{other}/dir{step}")  # noqa: PTH102
            case 5:
                os.rename(path, f"{other}/moved{step}")  # noqa: PTH104
            case 6:
                os.link(path, f"{other}/link{step}")
            case 7:
                os.chown(other, rng.randrange(1000), 7)
            case 8:
                os.setxattr(path, "user.x", os.urandom(8))
            case 9:
                inner = rng.choice(directories[1:])
                if not f"{other}/".startswith(f"{inner}/"):
                    os.rename(inner, f"{other}/tree{step}")  # noqa: PTH104


@pytest.fixture(scope="module")
def image(driver):
    driver.create("image")
    driver.apply("image", "", many(3000))
    yield "image"
    driver.remove("image")


@pytest.mark.parametrize("round_", range(6))
def test_the_delta_leads_to_all_that_a_walk_finds(driver, image, rng, round_, monkeypatch):
    driver.create("child", image)
    where = driver.get("child")
    disturb(where, rng, (0, 1, 3, 10, 30, 100)[round_])
    assert driver.changes("child", image) == walked(driver, "child", image)
    driver.put("child")
    driver.create("grandchild", "child")
    disturb(driver.get("grandchild"), rng, 5)
    driver.put("grandchild")
    for parent in ("child", image):
        assert driver.changes("grandchild", parent) == walked(driver, "grandchild", parent)
    driver.remove("grandchild")
    driver.remove("child")


def test_a_file_with_names_in_several_directories_is_found_under_each(driver, image):
    driver.create("child", image)
    where = driver.get("child")
    os.link(where / "d0/s0/f0", where / "d0/s9/again")
    driver.put("child")
    driver.create("grandchild", "child")
    (driver.get("grandchild") / "d0/s0/f0").write_text("changed")
    driver.put("grandchild")
    assert driver.changes("grandchild", "child") == [
        ("/d0", "M"), ("/d0/s0", "M"), ("/d0/s0/f0", "M"), ("/d0/s9", "M"), ("/d0/s9/again", "M"),
    ]  # fmt: skip
    driver.remove("grandchild")
    driver.remove("child")


def test_a_larger_filesystem_is_compared_too(driver, image):
    driver.create("child", image, "3G")
    where = driver.get("child")
    (where / "d0/s0/f0").write_text("changed")
    (where / "fresh").mkdir()
    assert driver.changes("child", image) == walked(driver, "child", image)
    driver.put("child")
    driver.remove("child")


def test_what_is_no_such_filesystem_gives_no_answer(tmp_path, rng):
    for content in (b"", bytes(1 << 20), rng.randbytes(1 << 20)):
        path = tmp_path / "file"
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        try:
            assert ext4.leading_inodes(fd, fd, [(0, 1 << 20)]) is None
        finally:
            os.close(fd)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_changes_in_a_hundred_thousand_files_are_found_sooner_than_by_a_walk():
    with a_driver(size=4 << 30, base_size=2 << 30) as driver:
        driver.create("image")
        driver.apply("image", "", many(FILES))
        driver.create("child", "image")
        where = driver.get("child")
        for number in range(10):
            index = number * 97
            path = where / f"d{index // 30}/s{index}/f{index * 100 + number}"
            path.write_text("changed")
        driver.put("child")
        quick, found = quickest(lambda: driver.changes("child", "image"))
        size, bytes_ = quickest(lambda: driver.size("child", "image"))
        begin = time.monotonic()
        assert walked(driver, "child", "image") == found
        slow = time.monotonic() - begin
        print(f"changes {quick:.3f} s, size {size:.3f} s, a walk {slow:.3f} s")  # noqa: T201
        assert sum(kind == "M" for _, kind in found) >= 10
        assert bytes_ == 10 * len("changed")
        assert quick * 20 < slow
        assert size * 20 < slow


def quickest(call):
    """The least time of three, since others use this host too; and what came of it."""
    times = []
    for _ in range(3):
        begin = time.monotonic()
        result = call()
        times.append(time.monotonic() - begin)
    return min(times), result
