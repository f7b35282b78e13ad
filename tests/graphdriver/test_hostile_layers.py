"""Layers made to break out of their root, sent through the driver: nothing outside changes."""

from __future__ import annotations

import gzip
import os

import pytest

from tests.graphdriver.kit import RefusedError
from tests.oci.tarbuild import Tar
from tests.oci.test_hostile import HARMLESS, KINDS, LIES, NAMES, PIVOTS, WHITEOUTS, member
from tests.oci.trees import state

pytestmark = [
    pytest.mark.root,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
    pytest.mark.slow,
]


def corpus(canary):
    """Hostile tars by name."""
    at = os.fsencode(canary)
    found = {}
    for number, name in enumerate(NAMES):
        for kind in (KINDS[number % len(KINDS)], KINDS[(number + 3) % len(KINDS)]):
            if kind == "opaque" and name in (b"/", b"/.."):
                continue  # see tests/oci
            where = name.replace(b"%(canary)s", at)
            found[f"{kind} {name!r}"] = member(Tar(), kind, where).end()
    for number, target in enumerate(PIVOTS):
        for kind in (KINDS[number % len(KINDS)], KINDS[(number + 5) % len(KINDS)]):
            tar = Tar().symlink(b"pivot", target.replace(b"%(canary)s", at))
            found[f"{kind} through {target!r}"] = member(tar, kind, b"pivot/victim").end()
    for name in WHITEOUTS:
        found[f"whiteout {name!r}"] = Tar().file(name.replace(b"%(canary)s", at)).end()
    for number, first in enumerate(KINDS):
        second = KINDS[(number + 4) % len(KINDS)]
        tar = member(member(Tar(), first, b"twice"), second, b"twice")
        found[f"{first} and {second} of one name"] = tar.file(b"after", b"x").end()
    for kind, name in ((b"3", "character device"), (b"4", "block device"), (b"6", "fifo")):
        over = Tar().file(b"victim", b"mine").add(b"victim", kind=kind, device=(1, 3))
        found[f"{name} over a file and back"] = over.file(b"victim", b"pwned").end()
        found[f"{name} below the lower layer's file"] = (
            Tar().add(b"victim", kind=kind, device=(8, 0)).file(b"victim/x", b"pwned").end()
        )
    found["gzip bomb"] = gzip.compress(bytes(64 << 20))
    found["gzip of a tar"] = gzip.compress(Tar().file(b"f", b"x").end())
    found |= {f"lie {name}": data for name, data in LIES.items()}
    return found


def attempt(driver, tar):
    """What the driver says against a tar; None where it takes it."""
    try:
        driver.apply("evil", "below", tar)
    except RefusedError as error:
        return str(error)
    return None


@pytest.mark.timeout(900)
def test_nothing_outside_the_root_changes(driver, tmp_path):
    canary = tmp_path / "canary"
    (canary / "dir/inner").mkdir(parents=True)
    (canary / "victim").write_bytes(b"untouched")
    (canary / "dir/inner/file").write_bytes(b"untouched")
    before = state(canary)
    passwd = os.stat("/etc/passwd")  # noqa: PTH116 - compared whole
    tars = corpus(canary)
    assert len(tars) >= 100
    driver.layer("below", victim=b"lower")
    refused = 0
    for name, tar in tars.items():
        driver.create("evil", "below")
        said = attempt(driver, tar)
        assert said is None or (said and "internal" not in said), name
        assert driver.exists("evil") == (said is None), name
        refused += said is not None
        driver.remove("evil")
        assert state(canary) == before, name
    assert refused >= len(LIES) - len(HARMLESS)
    assert os.stat("/etc/passwd") == passwd  # noqa: PTH116 - as above
    driver.remove("below")
    assert driver.volumes() == {"base"}
    assert driver.mounted() == set()
    assert "Traceback" not in driver.log.read_text()
