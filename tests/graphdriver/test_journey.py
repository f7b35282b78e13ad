"""What Docker's users do, on a pool and on overlay2 side by side; both sides end after every stage.

Each stage runs on a dockerd over the driver and on one over overlay2, and what they show must be
the same. After it the driver and its dockerd are stopped or killed, by turns, and started again. At
the end everything is removed, and the pool is as small as it was before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.graphdriver.dockerd import (
    CHANGES,
    Dockerd,
    a_dockerd,
    a_registry,
    image_archive,
    layer_tars,
    root_tar,
    tree_of,
)
from tests.graphdriver.kit import GIB, a_driver, eventually

pytestmark = [
    pytest.mark.docker,
    pytest.mark.registry,
    pytest.mark.overlay,
    pytest.mark.thin_tools,
    pytest.mark.slow,
    pytest.mark.fuse,
    pytest.mark.loop,
    pytest.mark.ext4,
]

PLUGINS = Path("/run/docker/plugins")
OFFLINE = "--network=none"


class Journey:
    """Two daemons, the driver below the first, and the turns in which both of its sides end."""

    def __init__(self, ours, theirs, driver, folder, registry):
        self.ours = ours
        self.theirs = theirs
        self.driver = driver
        self.folder = folder
        self.registry = registry
        self.turn = 0
        self.compared = 0

    def stage(self, step):
        """A step on both; what it shows is the same. Then the first one's sides end."""
        shown = [step(self, daemon) for daemon in (self.ours, self.theirs)]
        assert not list(differences(step.__name__, *shown))
        self.compared += 1
        self.restart()

    def images(self):
        return set(self.ours("images", "-q", "--no-trunc").split())

    def restart(self):
        """The driver, then dockerd, then both; killed every other time."""
        ends = (
            (self.driver.kill, self.ours.stop),
            (self.driver.stop, self.ours.kill),
            (self.driver.kill, self.ours.kill),
            (self.driver.stop, self.ours.stop),
        )
        end_driver, end_daemon = ends[self.turn % len(ends)]
        self.turn += 1
        images = self.images()
        end_driver()
        self.driver.start()
        assert self.images() == images
        end_daemon()
        if self.turn % 3 == 0:  # and away while dockerd is not there to ask
            self.driver.kill()
            self.driver.start()
        self.ours.start()
        assert self.images() == images


def differences(where, ours, theirs):
    """What two values differ in, and no more of it than can be read."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from differences(f"{where} {key}", ours.get(key), theirs.get(key))
    elif isinstance(ours, set):
        if ours != theirs:
            yield where, ours - theirs, theirs - ours
    elif isinstance(ours, (list, tuple)) and theirs is not None and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(f"{where} {number}", *pair)
    elif ours != theirs:
        yield where, f"{ours!r:.200}", f"{theirs!r:.200}"


def exported(daemon, image):
    """The tree of an image."""
    daemon("create", "--name", "look", OFFLINE, image, "true")
    tree = tree_of(daemon.run("export", "look").stdout)
    daemon("rm", "look")
    return tree


def running(daemon, *command, image="base:1", options=()):
    return daemon("run", "--rm", OFFLINE, *options, image, *command)


# ---- the stages -----------------------------------------------------------------------------


def imports(_, daemon):
    daemon.run("import", "-", "base:1", stdin=root_tar())
    found = json.loads(daemon("inspect", "base:1"))[0]
    return found["RootFS"], found["Size"], exported(daemon, "base:1")


def loads(_, daemon):
    daemon.run("load", stdin=image_archive("loaded:1", layer_tars()))
    found = json.loads(daemon("inspect", "loaded:1"))[0]
    return found["RootFS"], exported(daemon, "loaded:1")


DOCKERFILE = """
FROM loaded:1
COPY data /data
RUN echo one > /one && rm /dir/file2 && chmod 700 /sticky
RUN for d in a b c; do mkdir /many$d; for n in $(seq 300); do echo $n > /many$d/$n; done; done
RUN rm -r /manyb && mv /manya /moved && echo two >> /one && ln /one /hard && ln -s one /soft
RUN for n in $(seq 300); do echo again >> /moved/$n; done; rm -r /null; mkdir -p /deep/er/still
USER 1000
RUN id -u > /tmp/who || true
"""


def builds(journey, daemon, *, buildkit=False):
    context = journey.folder / "context"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "data").write_text("data")
    os.utime(context / "data", (1000, 1000))
    tag = f"built:{int(buildkit)}"
    daemon("build", OFFLINE, "-t", tag, str(context), buildkit=buildkit)
    layers = json.loads(daemon("inspect", tag))[0]["RootFS"]["Layers"]
    said = running(daemon, "sh", "-c", "cat /one /data; id -u; ls /manyb 2>&1; true", image=tag)
    return len(layers), said, exported(daemon, tag)


def builds_with_buildkit(journey, daemon):
    found = builds(journey, daemon, buildkit=True)
    if daemon is journey.theirs:  # this once, to see what a restart makes BuildKit forget
        daemon.stop()
        daemon.start()
    return found


def forgotten(daemon, layers):
    """Layers of BuildKit's that are still there when Docker says that it has none."""
    daemon("system", "prune", "-af")
    assert daemon("images", "-q") == ""
    assert "Build cache usage: 0B" in daemon("system", "df", "-v")
    return {name for name in layers() if len(name) == BUILDKIT_ID}


BUILDKIT_ID = 25


def runs_and_changes(_, daemon):
    daemon("run", "-d", "--stop-timeout=1", "--name", "box", OFFLINE, "base:1", "sleep", "9999")
    assert daemon("diff", "box") == ""
    daemon("exec", "box", "sh", "-c", CHANGES)
    return set(daemon("diff", "box").splitlines()), tree_of(daemon.run("export", "box").stdout)


def looks_again(_, daemon):
    """What was changed is there after the restart."""
    daemon("start", "box")
    found = json.loads(daemon("inspect", "-s", "box"))[0]
    sizes = found["SizeRw"], found["SizeRootFs"] - found["SizeRw"]
    return set(daemon("diff", "box").splitlines()), sizes, daemon("exec", "box", "cat", "/new")


def opens_without_writing(journey, daemon):
    """The exception that docs/docker.md names: overlay2 has copied the files, and may list them."""
    script = "exec 3<>/dir/file9; touch -d @0 /dir; : >> /dir/file10"
    before = set(daemon("diff", "box").splitlines())
    daemon("exec", "box", "sh", "-c", script)
    after = set(daemon("diff", "box").splitlines()) - before
    assert after <= (set() if daemon is journey.ours else {"C /dir/file9", "C /dir/file10"})


def copies(journey, daemon):
    where = journey.folder / f"copied-{daemon is journey.ours}"
    (journey.folder / "sent").write_text("sent")
    os.utime(journey.folder / "sent", (1000, 1000))
    daemon("cp", str(journey.folder / "sent"), "box:/dir/sent")
    daemon("cp", "box:/dir/file5", str(where))
    tar = tree_of(daemon.run("cp", "box:/dir", "-").stdout)
    return where.read_bytes(), tar, daemon("exec", "box", "cat", "/dir/sent")


def commits(_, daemon):
    daemon("start", "box")
    daemon("commit", "box", "committed:1")
    daemon("exec", "box", "sh", "-c", "echo more > /more")
    daemon("commit", "--pause=false", "box", "committed:2")
    trees = [exported(daemon, f"committed:{number}") for number in (1, 2)]
    assert trees[1] == tree_of(daemon.run("export", "box").stdout)
    return trees


def saves_and_loads(_, daemon):
    archive = daemon.run("save", "committed:1").stdout
    layers = daemon("inspect", "-f", "{{.Id}} {{.RootFS.Layers}}", "committed:1")
    daemon("rmi", "committed:1")
    daemon.run("load", stdin=archive)
    assert daemon("inspect", "-f", "{{.Id}} {{.RootFS.Layers}}", "committed:1") == layers
    assert daemon.run("save", "committed:1").stdout == archive
    return exported(daemon, "committed:1")


def pushes(journey, daemon):
    mine = f"{journey.registry}/{'ours' if daemon is journey.ours else 'theirs'}:1"
    daemon("tag", "built:0", mine)
    daemon("push", mine)
    daemon("rmi", mine)


def pulls(journey, daemon):
    """What the other one pushed, and what it pushed itself."""
    trees = []
    for whose in ("ours", "theirs"):
        name = f"{journey.registry}/{whose}:1"
        daemon("pull", name)
        trees.append(exported(daemon, name))
        daemon("rmi", name)
    assert trees[0] == trees[1]
    return trees


def removes_images(_, daemon):
    daemon("rm", "-f", "box")
    daemon("rmi", "committed:1", "committed:2", "built:0")
    return running(daemon, "cat", "/one", image="built:1")


# ---- what only one of them has ----------------------------------------------------------------


def limited(daemon):
    fill = "dd if=/dev/zero of=/fill bs=1024k count=400 2>&1; stat -c %s /fill"
    said = running(daemon, "sh", "-c", fill, options=("--storage-opt", "size=100M"))
    assert "No space left on device" in said
    assert 80 << 20 < int(said.split()[-1]) <= 100 << 20
    said = running(daemon, "sh", "-c", "df -m / | cat", options=("--storage-opt", "size=2G"))
    assert int(re.findall(r"(\d+) +\d+ +\d+ +\d+%", said)[0]) > 1800
    failed = daemon.run(
        "run", "--rm", OFFLINE, "--storage-opt", "size=x", "base:1", "true", check=False
    )
    assert b"size" in failed.stderr


def fifty(daemon):
    started = [
        daemon.background("run", "--rm", OFFLINE, "base:1", "sh", "-c", f"echo {n} > /n; cat /n")
        for n in range(50)
    ]
    said = [process.communicate()[0].decode().strip() for process in started]
    assert said == [str(n) for n in range(50)]
    assert daemon("ps", "-aq") == ""


def thin_check(path):
    return subprocess.run(["thin_check", path], capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_the_journey(require, tmp_path):
    name = f"tp{secrets.token_hex(4)}"
    PLUGINS.mkdir(mode=0o755, parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="d-", dir=Path(os.environ["THINPOOL_RUN"]).parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        driver = stack.enter_context(
            a_driver(name=name, socket=PLUGINS / f"{name}.sock", size=4 * GIB)
        )
        registry = stack.enter_context(a_registry(tmp_path / "registry"))
        theirs = stack.enter_context(a_dockerd("overlay2"))
        before = driver.api.status(driver.pool).data.used
        ours = Dockerd(folder, name)
        stack.callback(ours.close)
        ours.start()
        journey = Journey(ours, theirs, driver, tmp_path, registry)
        for step in (
            imports, loads, builds, builds_with_buildkit, runs_and_changes, looks_again, commits,
            saves_and_loads, pushes, pulls, copies_again, removes_images,
        ):  # fmt: skip
            journey.stage(step)
        limited(ours)
        journey.restart()
        fifty(ours)
        journey.restart()
        # BuildKit forgets a layer over a restart, with any driver: it is removed by hand.
        left = forgotten(ours, driver.volumes)
        overlays = theirs.folder / "data/overlay2"
        same = forgotten(theirs, lambda: {each.name for each in overlays.iterdir()})
        print(f"forgotten by BuildKit: {len(left)} here, {len(same)} on overlay2")  # noqa: T201
        assert len(left) <= len(same)
        for layer in left:
            driver.remove(layer)
        eventually(lambda: driver.volumes() == {"base"})
        assert driver.mounted() == set()
        eventually(lambda: driver.api.status(driver.pool).data.used == before)
        assert driver.api.check(driver.pool).clean
        log = driver.log.read_text()
        assert "Traceback" not in log, log
        metadata = driver.api.status(driver.pool).metadata.path
        ours.stop()
        driver.stop()
        # Its server ends a while after the last use.
        eventually(lambda: thin_check(metadata).returncode == 0)


def copies_again(journey, daemon):
    """The container is not running after a restart, and its files are there all the same."""
    found = copies_stopped(journey, daemon)
    daemon("start", "box")
    opens_without_writing(journey, daemon)
    return found, copies(journey, daemon)


def copies_stopped(_, daemon):
    return tree_of(daemon.run("cp", "box:/dir", "-").stdout)
