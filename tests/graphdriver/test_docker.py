"""Docker itself on the driver: what its users do, restarts of each side, and nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.graphdriver.dockerd import CHANGES, Dockerd, a_dockerd, root_tar, tree_of
from tests.graphdriver.kit import GIB, a_driver, eventually

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
    docker("run", "-d", OFFLINE, "--name", name, "base:1", "sleep", "600")
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


def test_same_changes_and_trees_as_overlay2(docker, require):
    require("overlay")
    seen = []
    with a_dockerd("overlay2") as other:
        other.run("import", "-", "base:1", stdin=root_tar())
        for daemon in (docker, other):
            daemon("run", "--name", "changed", OFFLINE, "base:1", "sh", "-c", CHANGES)
            changes = set(daemon("diff", "changed").splitlines())
            exported = tree_of(daemon.run("export", "changed").stdout)
            daemon("commit", "changed", "changed:1")
            daemon("create", "--name", "committed", OFFLINE, "changed:1", "true")
            committed = tree_of(daemon.run("export", "committed").stdout)
            daemon("rm", "changed", "committed")
            daemon("rmi", "changed:1")
            seen.append((changes, exported, committed))
    ours, theirs = seen
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]
    assert ours[2] == theirs[2]
    assert ours[1] == ours[2]


def test_container_that_changes_nothing_has_no_changes(docker, container):
    assert docker("diff", container) == ""


DOCKERFILE = """
FROM base:1
COPY data /data
RUN echo one > /one && rm /dir/file2
RUN for d in a b c; do mkdir /many$d; for n in $(seq 300); do echo $n > /many$d/$n; done; done
RUN rm -r /manyb && mv /manya /moved && echo two >> /one
"""


@pytest.mark.parametrize("buildkit", [False, True], ids=["classic", "buildkit"])
def test_build(docker, buildkit, tmp_path):
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "data").write_text("data")
    docker("build", OFFLINE, "-t", "built:1", str(tmp_path), buildkit=buildkit)
    script = (
        "cat /one /data; echo; find /moved /manyc -type f | "
        "(n=0; while read x; do n=$((n+1)); done; echo $n); ls /dir/file2 /manyb"
    )
    said = docker.run("run", "--rm", OFFLINE, "built:1", "sh", "-c", script, check=False)
    assert said.stdout.decode().split() == ["one", "two", "data", "600"]
    assert said.returncode != 0
    assert b"/dir/file2: No such file" in said.stderr
    docker("rmi", "built:1")
    docker("builder", "prune", "-af")


def test_save_and_load_of_an_image_of_several_layers(docker, tmp_path):
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "data").write_text("data")
    docker("build", OFFLINE, "-t", "several:1", str(tmp_path))
    before = docker("inspect", "-f", "{{.Id}} {{.RootFS.Layers}}", "several:1")
    archive = docker.run("save", "several:1").stdout
    docker("rmi", "several:1")
    docker.run("load", stdin=archive)
    assert docker("inspect", "-f", "{{.Id}} {{.RootFS.Layers}}", "several:1") == before
    assert docker("run", "--rm", OFFLINE, "several:1", "cat", "/one") == "one\ntwo"
    assert docker.run("save", "several:1").stdout == archive
    docker("rmi", "several:1")


def test_storage_opt_size_is_a_limit(docker):
    fill = "dd if=/dev/zero of=/fill bs=1024k count=400 2>&1; stat -c %s /fill"
    said = docker("run", "--rm", OFFLINE, "--storage-opt", "size=100M", "base:1", "sh", "-c", fill)
    assert "No space left on device" in said
    assert 80 << 20 < int(said.split()[-1]) <= 100 << 20
    said = docker(
        "run", "--rm", OFFLINE, "--storage-opt", "size=2G", "base:1", "sh", "-c", "df -m / | cat"
    )
    assert int(re.findall(r"(\d+) +\d+ +\d+ +\d+%", said)[0]) > 1800
    failed = docker.run(
        "run", "--rm", OFFLINE, "--storage-opt", "size=x", "base:1", "true", check=False
    )
    assert b"size" in failed.stderr


@pytest.mark.timeout(600)
def test_fifty_containers_at_once(docker):
    running = [
        docker.background("run", "--rm", OFFLINE, "base:1", "sh", "-c", f"echo {n} > /n; cat /n")
        for n in range(50)
    ]
    said = [process.communicate()[0].decode().strip() for process in running]
    assert said == [str(n) for n in range(50)]
    assert docker("ps", "-aq") == ""
    eventually(lambda: docker.driver.mounted() == set())
    eventually(lambda: docker.driver.status()["Deferred Deleted Device Count"] == "0")


def test_push_and_pull(docker, require, tmp_path):
    require("registry")
    registry = shutil.which("docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "registry.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path}/registry\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    name = f"127.0.0.1:{port}/pushed:1"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [registry, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log
        )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        docker("run", "--name", "pushed", OFFLINE, "base:1", "sh", "-c", "echo pushed > /pushed")
        docker("commit", "pushed", name)
        docker("rm", "pushed")
        before = docker("inspect", "-f", "{{.RootFS.Layers}}", name)
        docker("push", name)
        docker("rmi", name)
        docker("pull", name)
        assert docker("inspect", "-f", "{{.RootFS.Layers}}", name) == before
        assert docker("run", "--rm", OFFLINE, name, "cat", "/pushed") == "pushed"
        docker("rmi", name)
    finally:
        process.terminate()
        process.wait()


def test_commit_without_a_pause(docker, container):
    docker("exec", container, "sh", "-c", "echo kept > /kept")
    docker("commit", "--pause=false", container, "unpaused:1")
    assert docker("run", "--rm", OFFLINE, "unpaused:1", "cat", "/kept") == "kept"
    docker("rmi", "unpaused:1")


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
            "run", "-d", OFFLINE, "--name", "sees", "-v", f"/:/host:{propagation}",
            "base:1", "sleep", "600",
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
