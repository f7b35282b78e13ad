"""A graph driver as dockerd meets it: a process, its socket, and a pool of its own."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from thinpool import Thinpool
from thinpool.host import mountinfo, mounts

MIB = 1 << 20
GIB = 1 << 30


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path):
        super().__init__("docker", timeout=60)
        self.path = path

    def connect(self):
        self.sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self.sock.connect(str(self.path))  # blocking: a full backlog is waited for
        self.sock.settimeout(60)


class RefusedError(Exception):
    """The driver's Err."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class Driver:
    """One pool and its driver's process."""

    def __init__(self, folder, *, pool="p", name="tp", socket=None, patience_ms=None, **settings):
        self.folder = folder
        self.root = folder / "root"
        self.pool = pool
        self.name = name
        self.socket = socket or folder / "tp.sock"
        self.log = folder / "serve.log"
        self.api = Thinpool(self.root)
        self.api.create_pool(pool, **settings)
        if patience_ms is not None:  # how long a full pool is waited for; no setting of people's
            self.set_patience(patience_ms)
        self.uuid = self.api.status(pool).uuid
        self.places = (
            Path(os.environ["THINPOOL_RUN"]) / "graphdriver" / f"{name}-{self.uuid}" / "mnt"
        )
        self.process = None

    def set_patience(self, milliseconds):
        eventually(lambda: not (self.root / "pools" / self.pool / "server.sock").exists())
        path = self.root / "pools" / self.pool / "pool.json"
        settings = json.loads(path.read_text())
        assert "no_space_timeout_ms" in settings
        path.write_text(json.dumps(settings | {"no_space_timeout_ms": milliseconds}))

    # ---- the process ------------------------------------------------------------------------

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "thinpool", "--root", str(self.root), "serve",
                 "graphdriver", self.pool, "--name", self.name, "--socket", str(self.socket)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 180  # a guest without KVM takes 9 s, and 60 beside others
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.call("Plugin.Activate")
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def stop(self):
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait(90)
            self.process = None
            assert code == 0, self.log.read_text()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process = None

    def close(self):
        """Stop it, and leave nothing mounted and no pool."""
        if self.process is not None:
            for layer in self.mounted():
                self.call("GraphDriver.Remove", ID=layer)
            self.stop()
        for entry in reversed(mountinfo.own_mounts()):
            if f"{entry.mount_point}/".startswith(f"{self.places.parent}/"):
                mounts.unmount(entry.mount_point, lazy=True)
        self.api.remove(
            [str(each) for each in self.api.list(self.pool) if each.name != "base"]
            or [f"{self.pool}/base"],
            deactivate=True,
        )
        self.api.remove_pool(self.pool)

    # ---- the protocol -----------------------------------------------------------------------

    def request(self, path, body=b"", headers=None, *, method="POST"):
        """One request; its status and the bytes of its answer."""
        connection = Connection(self.socket)
        try:
            chunked = "Transfer-Encoding" in (headers or {})
            connection.request(
                method, path, body=body, headers=headers or {}, encode_chunked=chunked
            )
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def call(self, name, **fields):
        """A call with a JSON answer."""
        status, body = self.request(f"/{name}", json.dumps(fields).encode() if fields else b"")
        answer = json.loads(body)
        if status != 200 or answer.get("Err"):
            raise RefusedError(status, answer["Err"])
        return answer

    def create(self, layer, parent="", size=None):
        options = {"StorageOpt": {"size": size}} if size else {}
        self.call("GraphDriver.CreateReadWrite", ID=layer, Parent=parent, **options)

    def get(self, layer):
        return Path(self.call("GraphDriver.Get", ID=layer)["Dir"])

    def put(self, layer):
        self.call("GraphDriver.Put", ID=layer)

    def remove(self, layer):
        self.call("GraphDriver.Remove", ID=layer)

    def exists(self, layer):
        return self.call("GraphDriver.Exists", ID=layer)["Exists"]

    def changes(self, layer, parent):
        answer = self.call("GraphDriver.Changes", ID=layer, Parent=parent)
        return [(each["Path"], "MAD"[each["Kind"]]) for each in answer["Changes"]]

    def size(self, layer, parent):
        return self.call("GraphDriver.DiffSize", ID=layer, Parent=parent)["Size"]

    def diff(self, layer, parent=""):
        fields = json.dumps({"ID": layer, "Parent": parent}).encode()
        status, body = self.request("/GraphDriver.Diff", fields)
        if status != 200:
            raise RefusedError(status, json.loads(body)["Err"])
        return body

    def apply(self, layer, parent, tar):
        """ApplyDiff as Docker sends it: chunked, uncompressed."""
        status, body = self.request(
            f"/GraphDriver.ApplyDiff?id={layer}&parent={parent}",
            iter([tar[at : at + 65536] for at in range(0, len(tar), 65536)]),
            {"Transfer-Encoding": "chunked", "Content-Type": "application/octet-stream"},
        )
        answer = json.loads(body)
        if status != 200 or "Err" in answer:
            raise RefusedError(status, answer["Err"])
        return answer["Size"]

    def layer(self, layer, parent="", **files):
        """A layer with files, as a load makes it."""
        self.create(layer, parent)
        return self.apply(layer, parent, tar_of(files))

    # ---- what is seen from outside ----------------------------------------------------------

    def mounted(self):
        prefix = f"{self.places}/"
        return {
            entry.mount_point.removeprefix(prefix)
            for entry in mountinfo.own_mounts()
            if entry.mount_point.startswith(prefix)
        }

    def status(self):
        return dict(self.call("GraphDriver.Status")["Status"])

    def volumes(self):
        return {each.name for each in self.api.list(self.pool)}


def tar_of(files):
    """A layer's tar: contents by name, None for a directory."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return stream.getvalue()


def eventually(true, seconds=30):
    """See that something becomes so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextlib.contextmanager
def a_driver(*, name="tp", socket=None, **settings):
    folder = Path(tempfile.mkdtemp(prefix="g-", dir=Path(os.environ["THINPOOL_RUN"]).parent))
    driver = Driver(
        folder, name=name, socket=socket, **{"size": 2 * GIB, "base_size": GIB, **settings}
    )
    try:
        driver.start()
        yield driver
    finally:
        driver.close()
        shutil.rmtree(folder)
