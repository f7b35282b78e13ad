"""dockerd itself, on its own folders, without a network."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from tests.graphdriver.kit import tar_of
from tests.oci.tarbuild import Tar

DOCKERD = "/usr/sbin/dockerd"
DOCKER = "/usr/bin/docker"  # a newer client may stand before it in PATH, and wants buildx


class Dockerd:
    """One daemon with a storage driver."""

    def __init__(self, folder, storage, *options):
        self.folder = folder
        self.storage = storage
        self.options = options
        self.socket = folder / "docker.sock"
        self.log = folder / "dockerd.log"
        self.process = None
        (folder / "daemon.json").write_text("{}")

    def command(self, *options):
        return [
            DOCKERD, f"--config-file={self.folder}/daemon.json",
            "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/exec",
            "--pidfile", f"{self.folder}/pid", "-H", f"unix://{self.socket}",
            "--bridge=none", "--iptables=false", "--ip6tables=false", "--experimental",
            f"--storage-driver={self.storage}", *self.options, *options,
        ]  # fmt: skip

    def starts_not(self, *options, within=()):
        """What it says when it does not start."""
        done = subprocess.run(
            [*within, *self.command(*options)],
            stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        said = (done.stdout + done.stderr).decode()
        assert done.returncode not in (0, None), said
        return said

    def start(self, *options):
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "pid").unlink()  # of one that was killed
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(*options), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while self.run("version", check=False).returncode:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]
        self.process = None

    def kill(self):
        """Kill it; containerd goes with its parent, but is reaped by somebody else."""
        self.process.kill()
        self.process.wait()
        self.process = None
        record = self.folder / "exec/containerd/containerd.pid"
        state = Path(f"/proc/{record.read_text()}/stat")
        deadline = time.monotonic() + 30
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while state.read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline
                time.sleep(0.05)
        record.unlink()  # a zombie's number would keep the next daemon from starting one

    def run(self, *arguments, check=True, stdin=b"", buildkit=False, timeout=180):
        environment = os.environ | {
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_BUILDKIT": "1" if buildkit else "0",
            "DOCKER_CONFIG": str(self.folder / "config"),
        }
        done = subprocess.run(
            [DOCKER, *arguments],
            input=stdin, capture_output=True, check=False, env=environment, timeout=timeout,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, (
                f"{done.returncode} docker {' '.join(arguments)}: {done.stderr.decode()}"
            )
        return done

    def __call__(self, *arguments, **options):
        """What a client's command prints."""
        return self.run(*arguments, **options).stdout.decode().strip()

    def background(self, *arguments):
        environment = os.environ | {"DOCKER_HOST": f"unix://{self.socket}"}
        return subprocess.Popen(
            [DOCKER, *arguments], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def close(self):
        """Remove all containers, stop the daemon, and unmount what it leaves mounted."""
        if self.process is not None and self.process.poll() is None:
            found = self("ps", "-aq", check=False).split()
            if found:
                self("rm", "-f", *found, check=False)
            self.stop()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            target = line.split()[4]
            if target.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "-l", target], check=False)


@contextlib.contextmanager
def a_dockerd(storage, *options):
    folder = Path(tempfile.mkdtemp(prefix="d-", dir=Path(os.environ["THINPOOL_RUN"]).parent))
    daemon = Dockerd(folder, storage, *options)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(folder, ignore_errors=True)


COMMANDS = "sh ls cat echo rm dd mkdir touch sleep mv ln true df id cp stat chmod chown seq find"


def root_tar():
    """A root filesystem of a few files: busybox."""
    busybox = Path("/bin/busybox").read_bytes()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:

        def add(name, content=None, **fields):
            member = tarfile.TarInfo(name)
            member.mode = 0o755
            for key, value in fields.items():
                setattr(member, key, value)
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))

        for name in ("bin", "etc", "tmp", "dir", "dir/sub"):
            add(name, type=tarfile.DIRTYPE)
        add("bin/busybox", busybox)
        for name in COMMANDS.split():
            add(f"bin/{name}", type=tarfile.SYMTYPE, linkname="busybox")
        add("etc/passwd", b"root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n", mode=0o644)
        add("etc/group", b"root:x:0:\n", mode=0o644)  # BuildKit fails without one
        for number in range(20):
            add(f"dir/file{number}", b"%d" % number * 1000, mode=0o640, uid=number, gid=number)
        add("dir/sub/deep", b"deep")
        add("dir/hard", type=tarfile.LNKTYPE, linkname="dir/file1", mode=0o640, uid=1, gid=1)
        add("dir/other", type=tarfile.LNKTYPE, linkname="dir/file2", mode=0o604, uid=9, gid=8)
    return stream.getvalue()


CHANGES = """
echo new > /new; rm /dir/file3; rm -r /dir/sub; mkdir /dir/sub; echo again > /dir/sub/other
chmod 4755 /dir/file4; chown 7:8 /dir/file5; mv /dir/file6 /dir/moved; ln -s nowhere /link
ln /dir/file7 /dir/hard7; echo x >> /dir/file8; mkdir -p /a/b/c; touch /a/b/c/d; rm /dir/file11
mkdir /dir/file11; dd if=/dev/zero of=/sparse bs=1 count=1 seek=10000000 2>/dev/null
"""
"""What a container does to root_tar()'s tree."""


def tree_of(tar):
    """Names, kinds, owners, modes, contents, and times where they are old, of a tar."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            name = member.name.removeprefix("./").rstrip("/")
            content = archive.extractfile(member).read() if member.isreg() else member.linkname
            if member.islnk():  # which name of a file comes first is the writer's
                content = archive.extractfile(member).read()
            if member.ischr() or member.isblk():
                content = (member.devmajor, member.devminor)
            kind = "file" if member.isreg() or member.islnk() else member.type
            mode = member.mode & 0o7777
            # What a run makes has the time of that run; what an archive brought has its own.
            old = member.mtime if member.mtime < OLD_S and not member.isdir() else None
            found[name] = (kind, mode, member.uid, member.gid, content, old)
    return found


OLD_S = 1_650_000_000  # tars of tests are older


def layer_tars():
    """The tars of an image of three layers: everything that a layer can do to the ones below."""
    upper, top = Tar(), Tar()
    upper.dir(b"dir").file(b"dir/.wh.file3", b"")
    upper.dir(b"dir/sub").file(b"dir/sub/.wh..wh..opq", b"").file(b"dir/sub/fresh", b"fresh")
    upper.file(b"dir/file4", b"other", mode=0o4755, uid=5, gid=6, mtime=123456)
    upper.link(b"dir/again", b"dir/file4", mode=0o600, uid=77, gid=78, mtime=7)
    upper.symlink(b"dir/file6", b"file7", mtime=8)
    upper.add(b"null", kind=b"3", device=(1, 3), mode=0o666).add(b"pipe", kind=b"6", mode=0o640)
    upper.file(b"x" * 200 + b"/" + b"y" * 200, b"long")
    upper.dir(b"sticky", mode=0o1777).file(b"sticky/f", b"1" * 100_000)
    upper.file("d\u00e9j\u00e0".encode(), b"name").file(b"empty", b"")
    top.dir(b"sticky", mode=0o1777).dir(b"dir").dir(b"dir/sub")  # as Docker's layers have them
    top.file(b"sticky/.wh.f", b"").file(b".wh.null", b"").dir(b"null").file(
        b"null/in", b"was a device"
    )
    top.file(b"dir/file6", b"a file again").file(b"dir/sub/.wh.fresh", b"")
    top.symlink(b"sticky/l", b"/etc/passwd").file(b"dir/file19", b"19", mode=0o400, uid=19, gid=19)
    return [root_tar(), upper.end(), top.end()]


def image_archive(reference, layers):
    """What docker load takes: an image of layers."""
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{each}" for each in digests]},
        "history": [{"created": "2020-01-01T00:00:00Z"} for _ in layers],
    }  # fmt: skip
    text = json.dumps(config).encode()
    name = f"{hashlib.sha256(text).hexdigest()}.json"
    members = {name: text}
    for number, layer in enumerate(layers):
        members[f"{number}/layer.tar"] = layer
    paths = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": name, "RepoTags": [reference], "Layers": paths}]
    members["manifest.json"] = json.dumps(manifest).encode()
    return tar_of(members)


@contextlib.contextmanager
def a_registry(folder):
    """The address of a registry on loopback."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "registry.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\n"
        f"http:\n  addr: 127.0.0.1:{port}\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "registry.yml")], stdout=log, stderr=log
        )
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
