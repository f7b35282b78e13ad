"""The driver on a pool of the kernel's: the same calls, and Docker itself.

In a guest where the host's kernel has no device-mapper. What the driver does with layers is the
same code for both engines; these hold it together with the kernel's devices.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.graphdriver.dockerd import CHANGES, Dockerd, image_archive, layer_tars, root_tar
from tests.graphdriver.kit import MIB, RefusedError, a_driver, eventually, tar_of
from tests.graphdriver.test_protocol import fill

pytestmark = [
    pytest.mark.dm,
    pytest.mark.ext4,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("guest-graphdriver"),
]

PLUGINS = Path("/run/docker/plugins")
OFFLINE = "--network=none"
WAIT = 120
"""Seconds: a guest without KVM is slow."""


@pytest.fixture(scope="module")
def kernels():
    name = f"tp{secrets.token_hex(4)}"
    PLUGINS.mkdir(mode=0o755, parents=True, exist_ok=True)
    with a_driver(
        name=name, socket=PLUGINS / f"{name}.sock", engine="dm", size=256 * MIB, base_size=128 * MIB
    ) as driver:
        yield driver


def test_layers_as_docker_makes_them(kernels):
    driver = kernels
    assert driver.status()["Pool Engine"] == "dm"
    before = driver.api.status("p").data.used
    for number, layer in enumerate(layer_tars()):
        driver.create(f"l{number}", f"l{number - 1}" if number else "")
        driver.apply(f"l{number}", f"l{number - 1}" if number else "", layer)
    driver.create("c-init", "l2", "32M")
    driver.create("c", "c-init", "32M")
    where = driver.get("c")
    assert (where / "dir/file6").read_bytes() == b"a file again"
    assert not (where / "null").is_char_device()
    (where / "new").write_text("new")
    (where / "dir/file8").unlink()
    listed = [("/dir", "M"), ("/dir/file8", "D"), ("/new", "A")]
    assert driver.changes("c", "c-init") == listed
    driver.kill()
    driver.start()
    assert (where / "new").read_text() == "new"
    tar = driver.diff("c", "c-init")
    driver.create("again", "l2")
    driver.apply("again", "l2", tar)
    assert driver.changes("again", "l2") == listed
    assert driver.size("c", "c-init") == 3
    assert 16 * MIB <= fill(where, most=60 * MIB) <= 32 * MIB
    driver.create("large", "l2", "256M")
    space = os.statvfs(driver.get("large"))
    assert space.f_blocks * space.f_frsize > 220 * MIB
    driver.put("large")
    driver.put("c")
    assert driver.mounted() == set()
    for layer in ("large", "again", "c", "c-init", "l2", "l1", "l0"):
        driver.remove(layer)
    eventually(lambda: driver.volumes() == {"base"}, seconds=WAIT)
    eventually(lambda: driver.api.status("p").data.used == before, seconds=WAIT)


def test_layer_that_does_not_fit_is_gone():
    with a_driver(engine="dm", size=96 * MIB, base_size=64 * MIB) as driver:
        driver.api.set("p", {"when-full": "error", "min-free": "0"})
        driver.create("other")
        where = driver.get("other")
        driver.create("large", size="256M")
        with pytest.raises(RefusedError, match=r"space|full"):
            driver.apply("large", "", tar_of({"large": os.urandom(110 * MIB)}))
        assert not driver.exists("large")
        (where / "after").write_text("after")
        driver.put("other")
        driver.remove("other")
        eventually(lambda: driver.status()["Pool Mode"] == "rw", seconds=WAIT)
        driver.layer("next", file=os.urandom(10 * MIB))
        driver.remove("next")


@contextlib.contextmanager
def cgroups():
    """What runc needs, where nobody has mounted it."""
    where = Path("/sys/fs/cgroup")
    if any(where.iterdir()):
        yield
        return
    subprocess.run(["mount", "-t", "cgroup2", "none", str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=False)


def test_docker_on_it(kernels, require):
    require("docker")
    before = kernels.api.status("p").data.used
    folder = Path(tempfile.mkdtemp(prefix="d-", dir=Path(os.environ["THINPOOL_RUN"]).parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(cgroups())
        daemon = Dockerd(folder, kernels.name)
        stack.callback(daemon.close)
        daemon.start()
        daemon.run("import", "-", "base:1", stdin=root_tar())
        daemon.run("load", stdin=image_archive("loaded:1", layer_tars()))
        run = ("run", "--name", "box", OFFLINE, "loaded:1", "sh", "-c", CHANGES)
        daemon(*run)
        assert "A /new" in daemon("diff", "box").splitlines()
        daemon("commit", "box", "committed:1")
        kernels.kill()
        kernels.start()
        daemon.kill()
        daemon.start()
        said = daemon("run", "--rm", OFFLINE, "committed:1", "cat", "/new", "/dir/sub/other")
        assert said == "new\nagain"
        daemon("rm", "box")
        daemon("system", "prune", "-af")
        eventually(lambda: kernels.volumes() == {"base"}, seconds=WAIT)
        eventually(lambda: kernels.api.status("p").data.used == before, seconds=WAIT)
        assert kernels.api.check("p").clean
    assert "Traceback" not in kernels.log.read_text()
