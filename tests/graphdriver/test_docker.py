"""Docker itself on the driver: what its users do, restarts of each side, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.graphdriver.dockerd import Dockerd, image_archive, root_tar
from tests.graphdriver.kit import GIB, MIB, RefusedError, a_driver, eventually, tar_of

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
]

PLUGINS = Path("/run/docker/plugins")
OFFLINE = "--network=none"


class Docker(Dockerd):
    """A daemon and the driver below it."""

    driver = None

    def layer_of(self, container):
        """The id of a container's layer."""
        return json.loads(self("inspect", container))[0]["GraphDriver"]["Data"]["DeviceName"][2:]


@pytest.fixture(scope="module")
def docker(require):
    require("docker", "fuse", "loop", "ext4")
    name = f"tp{secrets.token_hex(4)}"
    PLUGINS.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="d-", dir=Path(os.environ["THINPOOL_RUN"]).parent))
    with a_driver(name=name, socket=PLUGINS / f"{name}.sock", size=4 * GIB) as driver:
        daemon = Docker(folder, name)
        daemon.driver = driver
        try:
            daemon.start()
            daemon.run("import", "-", "base:1", stdin=root_tar())
            yield daemon
        finally:
            daemon.close()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def container(docker):
    """The name of a container that runs; gone afterwards."""
    name = f"c{secrets.token_hex(4)}"
    docker("run", "-d", "--stop-timeout=1", OFFLINE, "--name", name, "base:1", "sleep", "600")
    yield name
    docker("rm", "-f", name)


def test_info_shows_the_pools_facts(docker):
    said = docker("info")
    assert f"Storage Driver: {docker.driver.name}" in said
    assert "Pool Blocksize: 64 KiB" in said
    assert "Data Space Total: 4 GiB" in said


def test_run_exec_cp_and_inspect(docker, container, tmp_path):
    assert docker("exec", container, "cat", "/dir/sub/deep") == "deep"
    docker("exec", container, "sh", "-c", "echo 12345 > /made")
    docker("cp", f"{container}:/made", str(tmp_path / "made"))
    assert (tmp_path / "made").read_text() == "12345\n"
    (tmp_path / "sent").write_text("sent")
    docker("cp", str(tmp_path / "sent"), f"{container}:/sent")
    assert docker("exec", container, "cat", "/sent") == "sent"
    (found,) = json.loads(docker("inspect", "-s", container))
    assert found["SizeRw"] == len("12345\n") + len("sent")
    assert found["GraphDriver"]["Data"]["Filesystem"] == "ext4"


def test_container_that_changes_nothing_has_no_changes(docker, container):
    assert docker("diff", container) == ""


@pytest.mark.parametrize("propagation", ["rslave", "rshared"])
def test_container_that_sees_the_host_holds_no_other(docker, propagation, container):
    """They want a shared root, which is given for the time of the test."""
    if " shared:" not in _root_line():
        subprocess.run(["mount", "--make-shared", "/"], check=True)
        undo = ["mount", "--make-private", "/"]
    else:
        undo = ["true"]
    try:
        docker(
            "run", "-d", "--stop-timeout=1", OFFLINE, "--name", "sees",
            "-v", f"/:/host:{propagation}", "base:1", "sleep", "600",
        )  # fmt: skip
        docker("run", "--rm", OFFLINE, "base:1", "true")
        docker("rm", "-f", container)
        status = docker.driver.status()
        assert status["Deferred Deleted Device Count"] == "0"
        docker("rm", "-f", "sees")
        eventually(lambda: docker.driver.status()["Deferred Deleted Device Count"] == "0")
        docker("run", "-d", OFFLINE, "--name", container, "base:1", "sleep", "600")
    finally:
        docker.run("rm", "-f", "sees", check=False)
        subprocess.run(undo, check=True)


def _root_line():
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return next(line for line in lines if line.split()[4] == "/")


def test_driver_killed_under_a_running_container(docker, container):
    docker("exec", container, "sh", "-c", "echo before > /f")
    docker.driver.kill()
    docker.driver.start()
    assert docker("exec", container, "cat", "/f") == "before"
    docker("exec", container, "sh", "-c", "echo after > /f")
    assert docker("diff", container) == "A /f"
    docker("restart", "-t", "0", container)
    assert docker("exec", container, "cat", "/f") == "after"


def test_driver_is_waited_for_while_it_is_away(docker, container):
    docker.driver.kill()
    running = docker.background("run", "--rm", OFFLINE, "base:1", "echo", "patient")
    time.sleep(1.5)
    docker.driver.start()
    assert running.communicate()[0].decode().strip() == "patient"


def test_daemon_stopped_and_killed_finds_its_layers(docker, container):
    docker("exec", container, "sh", "-c", "echo kept > /f")
    for end in (docker.stop, docker.kill):
        end()
        docker.start()
        docker("start", container)
        assert docker("exec", container, "cat", "/f") == "kept"
    assert docker("run", "--rm", OFFLINE, "base:1", "echo", "fine") == "fine"


def test_live_restore_keeps_containers_over_restarts_of_both(docker, container):
    docker.stop()
    docker.start("--live-restore")
    docker("start", container)
    docker("exec", container, "sh", "-c", "echo alive > /f")
    pid = docker("inspect", "-f", "{{.State.Pid}}", container)
    docker.stop()
    docker.driver.kill()
    docker.driver.start()
    assert Path(f"/proc/{pid}/root/f").read_text() == "alive\n"
    docker.start("--live-restore")
    assert docker("inspect", "-f", "{{.State.Pid}}", container) == pid
    assert docker("exec", container, "cat", "/f") == "alive"
    docker("kill", container)
    docker.stop()
    docker.start()


DEEPEST = 125
"""Layers, in Docker's own store: it refuses more whatever the storage driver."""


def test_image_as_deep_as_docker_allows_builds_and_runs(docker, tmp_path):
    def small(number):
        return tar_of({f"layer{number}": b"%d" % number})

    layers = [root_tar(), *(small(number) for number in range(1, DEEPEST - 1))]
    docker.run("load", stdin=image_archive("deep:1", layers))
    (tmp_path / "Dockerfile").write_text("FROM deep:1\nRUN cat /layer1 /layer123 > /both\n")
    docker("build", OFFLINE, "--force-rm", "-t", "deep:2", str(tmp_path))
    assert len(json.loads(docker("inspect", "deep:2"))[0]["RootFS"]["Layers"]) == DEEPEST
    assert docker("run", "--rm", OFFLINE, "deep:2", "cat", "/both") == "1123"
    (tmp_path / "Dockerfile").write_text("FROM deep:2\nRUN echo > /more\n")
    failed = docker.run("build", OFFLINE, "--force-rm", str(tmp_path), check=False)
    assert b"max depth exceeded" in failed.stdout + failed.stderr
    docker("rmi", "deep:1", "deep:2")


def test_selinux_that_the_kernel_lacks(docker, container):
    """The daemon says so and sends no labels; one that came all the same is refused by name."""
    docker.stop()
    docker.start("--selinux-enabled")
    assert docker("run", "--rm", OFFLINE, "base:1", "echo", "fine") == "fine"
    if not Path("/sys/fs/selinux/enforce").exists():
        label = "system_u:object_r:container_file_t:s0:c1,c2"
        layer = docker.layer_of(container)
        with pytest.raises(RefusedError, match="this kernel has no SELinux"):
            docker.driver.call("GraphDriver.Get", ID=layer, MountLabel=label)
    docker.stop()
    docker.start()


SUBORDINATE = """
mount --bind "$0/subuid" /etc/subuid && mount --bind "$0/subgid" /etc/subgid && exec "$@"
"""


def test_remapped_users_are_refused_with_the_reason(docker, tmp_path):
    """In a mount namespace in which a user has subordinate ids."""
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text("daemon:100000:65536\n")
    folder = Path(tempfile.mkdtemp(prefix="tpu-"))
    folder.chmod(0o711)  # the remapped root must get to its folder
    other = Dockerd(folder, docker.storage)
    docker.stop()
    try:
        said = other.starts_not(
            "--userns-remap=daemon",
            within=["unshare", "-m", "sh", "-c", SUBORDINATE, str(tmp_path)],
        )
    finally:
        docker.start()
        other.close()
        shutil.rmtree(folder, ignore_errors=True)
    assert "user-namespace remapping (userns-remap) is not supported" in said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("when_full", ["error", "queue"])
def test_pool_that_fills_under_a_pull(docker, when_full, rng):
    """An error that says what it is; nothing else suffers; there is room once an image is gone."""
    name = f"tp{secrets.token_hex(4)}"
    folder = Path(tempfile.mkdtemp(prefix="d-", dir=Path(os.environ["THINPOOL_RUN"]).parent))
    settings = {"size": 192 * MIB, "min_free": 0, "when_full": when_full}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        driver = stack.enter_context(
            a_driver(name=name, socket=PLUGINS / f"{name}.sock", patience_ms=2000, **settings)
        )
        small = Dockerd(folder, name)
        stack.callback(small.close)
        small.start()

        def load(reference, mebibytes):
            content = tar_of({reference: rng.randbytes(mebibytes * MIB)})
            return small.run("load", stdin=image_archive(f"{reference}:1", [content]), check=False)

        small.run("import", "-", "base:1", stdin=root_tar())
        small("run", "-d", "--stop-timeout=1", OFFLINE, "--name", "alive", "base:1", "sleep", "600")
        assert load("ballast", 60).returncode == 0
        # What it still has to write when the pool is full waits no longer than the patience.
        small("exec", "alive", "busybox", "sync")
        layers = driver.volumes()
        failed = load("large", 200)
        assert failed.returncode != 0
        assert b"full" in failed.stdout + failed.stderr
        eventually(lambda: driver.volumes() == layers)
        assert "large" not in small("images")
        assert driver.status()["Pool Mode"] == "rw"
        assert small("exec", "alive", "sh", "-c", "echo alive > /f; cat /f") == "alive"
        small("rmi", "ballast:1")
        again = load("next", 100)
        assert again.returncode == 0, again.stderr
        assert small("exec", "alive", "cat", "/f") == "alive"
        assert driver.api.check("p").clean


def test_nothing_is_left_at_the_end(docker, require):
    docker("system", "prune", "-af")
    assert docker("images", "-q") == ""
    driver = docker.driver
    eventually(lambda: driver.volumes() == {"base"})
    assert driver.mounted() == set()
    assert driver.api.check("p").clean
    docker.run("import", "-", "base:1", stdin=root_tar())
    log = driver.log.read_text()
    assert "Traceback" not in log, log
