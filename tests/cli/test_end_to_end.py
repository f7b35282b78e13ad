"""The real thing, as a user runs it: whole jobs, wrong input, repeated and interrupted commands.

Nothing is faked: each command is a process, each pool has its server, volumes are mounted through
FUSE and loop.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from importlib import util
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.fuse, pytest.mark.loop, pytest.mark.ext4]

REPOSITORY = Path(__file__).resolve().parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
MIB = 1 << 20
GIB = 1 << 30

_spec = util.spec_from_file_location("cli_shapes", Path(__file__).with_name("shapes.py"))
shapes = util.module_from_spec(_spec)
_spec.loader.exec_module(shapes)


class Done:
    """What a command that ended has said."""

    def __init__(self, arguments: tuple[str, ...], code: int, stdout: bytes, stderr: bytes) -> None:
        self.arguments = arguments
        self.code = code
        self.raw = stdout
        self.stderr = stderr.decode()

    @property
    def stdout(self) -> str:
        return self.raw.decode()

    @property
    def document(self) -> Any:
        return json.loads(self.raw)

    def __repr__(self) -> str:
        return f"{self.arguments}: exit {self.code}\n{self.raw[:2000]!r}\n{self.stderr[:2000]}"


class Thinpool:
    """The program, over one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.last_state: dict[str, Any] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "thinpool", "--root", str(self.root), *arguments]

    def __call__(
        self, *arguments: str, stdin: bytes = b"", code: int | None = 0, **options: Any
    ) -> Done:
        """Run a command, and see that it ends as it should."""
        process = subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            check=False,
            timeout=120,
            **options,
        )
        done = Done(arguments, process.returncode, process.stdout, process.stderr)
        if code is not None:
            assert done.code == code, repr(done)
        return done

    def json(self, *arguments: str) -> Any:
        """Run a command with --json, and see that its answer has its shape."""
        document = self(*arguments, "--json").document
        assert shapes.problems(document, shapes.SHAPES[arguments[0]]) == []
        return document

    def error(self, *arguments: str, code: int) -> dict[str, Any]:
        """Run a command that has to fail, both ways: what it says, and its error in JSON."""
        plain = self(*arguments, code=code)
        assert plain.stdout == "", repr(plain)
        assert plain.stderr.startswith("thinpool"), repr(plain)
        assert plain.stderr.count("\n") == 1, repr(plain)
        document = self(*arguments, "--json", code=code).document
        assert shapes.problems(document, shapes.ERROR) == []
        return document["error"]

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def names(self, pool: str = "p") -> set[str]:
        return {volume["name"] for volume in self.json("list", pool)["volumes"]}

    def volume(self, ref: str) -> dict[str, Any]:
        pool, name = ref.split("/")
        return next(v for v in self.json("list", pool)["volumes"] if v["name"] == name)

    def state(self, pool: str = "p") -> dict[str, Any]:
        """All that a command which fails must leave as it was."""
        status = self.json("status", pool)
        keys = ["mode", "needs_check", "volumes", "active", "when_full", "min_free"]
        return {
            "volumes": self.json("list", pool),
            "status": {key: status[key] for key in [*keys, "transaction_id"]},
            "used": status["data"]["used"],
            "dump": self("dump", pool).raw,
            "mounts": mounts(self.root),
            "loops": loops(),
        }


def without_transactions(state: dict[str, Any]) -> dict[str, Any]:
    """A state as seen past transactions that were begun and undone."""
    dump = re.sub(rb' (transaction|time|snap_time)="[0-9]+"', b"", state["dump"])
    status = {key: value for key, value in state["status"].items() if key != "transaction_id"}
    return state | {"dump": dump, "status": status}


def mounts(root: Path) -> list[str]:
    """Where volumes are mounted, of this root's; its FUSE mounts come and go with servers."""
    places = (str(root), os.environ["THINPOOL_RUN"], str(root.parent))
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted(
        " ".join(line)
        for line in lines
        if line[4].startswith(places) and "fuse.thinpool" not in line
    )


def loops() -> list[str]:
    """Loop devices over files of this session's FUSE mounts."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = path.read_text()
        except OSError:  # another session's, gone meanwhile
            continue
        if backing.startswith(os.environ["THINPOOL_RUN"]):
            found.append(f"{path.parent.parent.name} {backing.strip()}")
    return sorted(found)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def a_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, _private_environment):
    """A pool for tests that leave it as it was, or use names of their own."""
    program = Thinpool(tmp_path_factory.mktemp("shared"))
    program("create-pool", "p", "--size", "2G", "--base-size", "256M", "--min-free", "1%")
    yield program
    program("remove-pool", "p", "--yes")


@pytest.fixture
def program(tmp_path):
    """A root of its own."""
    program = Thinpool(tmp_path / "root")
    yield program
    for pool in program.json("pools")["pools"]:
        program("remove-pool", pool["pool"], "--yes", code=None)


def create_pool(program: Thinpool, *arguments: str, name: str = "p") -> None:
    program(
        "create-pool", name, "--size", "1G", "--base-size", "128M", "--min-free", "1%", *arguments
    )


# ---- the main job -------------------------------------------------------------------------


def test_a_pool_an_image_and_containers_with_devices(program, tmp_path):  # noqa: PLR0915 - one job
    made = program("create-pool", "p", "--size", "2G", "--base-size", "256M")
    assert made.stdout.startswith("p: 2 GiB of data")
    base = program.volume("p/base")
    assert (base["kind"], base["parent"], base["size"]) == ("base", None, 256 * MIB)
    assert base["read_only"] is True

    archive = tmp_path / "image.tar"
    archive.write_bytes(a_tar({"etc/hello": b"hello\n", "big": os.urandom(5 * MIB)}))
    image = program.json("import", "p/image", str(archive))["volume"]
    assert (image["kind"], image["parent"], image["read_only"]) == ("image", "base", True)

    container = program.json("snapshot", "p/image", "p/c1")["volume"]
    assert (container["kind"], container["parent"]) == ("container", "image")
    assert container["mapped"] == image["mapped"]

    device = program("activate", "p/c1").stdout.strip()
    assert device.endswith("/dev/p/c1")
    assert Path(device).resolve().name.startswith("loop")
    size = Path(f"/sys/block/{Path(device).resolve().name}/size").read_text()
    assert int(size) * 512 == 256 * MIB

    directory = tmp_path / "mnt"
    directory.mkdir()
    program("mount", "p/c1", str(directory))
    assert (directory / "etc/hello").read_text() == "hello\n"
    (directory / "etc/hello").write_text("changed\n")
    (directory / "new").write_text("new\n")
    assert program.volume("p/c1")["mounts"] == [str(directory)]
    program("umount", "p/c1")
    assert not directory.is_mount()
    assert program.volume("p/c1")["device"] == device  # it had been active before
    program("deactivate", "p/c1")
    assert not Path(device).exists()

    lines = program("diff", "p/image", "p/c1").stdout.splitlines()
    assert {"M /etc/hello", "A /new"} <= set(lines)
    assert not any("/big" in line for line in lines)
    assert program.json("delta", "p/image", "p/c1")["ranges"] != []

    program("commit", "p/c1", "p/image2")
    assert program.volume("p/image2")["kind"] == "image"
    tree = program("list", "p", "--tree").stdout.splitlines()
    assert tree[1].startswith("p/base")
    assert "└── image " in tree[2]

    tar = program("export", "p/c1").raw
    with tarfile.open(fileobj=io.BytesIO(tar)) as exported:
        assert exported.extractfile("etc/hello").read() == b"changed\n"
        assert exported.extractfile("new").read() == b"new\n"

    report = program("check", "p")
    assert report.stdout.splitlines()[-1].startswith("p: clean")
    freed = program.json("remove", "p/c1", "--dry-run")
    assert freed["dry_run"] is True
    assert "c1" in program.names()
    used = program.json("status", "p")["data"]["used"]
    program("remove", "p/c1", "p/image")
    assert program.names() == {"base", "image2"}
    assert program.json("status", "p")["data"]["used"] <= used
    program("remove-pool", "p", "--yes")
    assert program("pools").stdout == ""
    assert not (program.root / "pools" / "p").exists()


def test_json_of_every_command_has_its_shape(program, tmp_path):
    directory = tmp_path / "mnt"
    directory.mkdir()
    archive = tmp_path / "image.tar"
    archive.write_bytes(a_tar({"f": b"x"}))
    create = ("--size", "1G", "--base-size", "128M", "--min-free", "1%")
    program.json("create-pool", "p", *create)
    program.json("pools")
    program.json("status", "p")
    program.json("set", "p", "when-full=error", "min-free=2%")
    assert program.json("status", "p")["when_full"] == "error"
    program.json("extend-pool", "p", "--data-size", "1.5G")
    assert program.json("status", "p")["data"]["total"] == 3 * GIB // 2
    program.json("create", "p/v", "--size", "64M", "--fs", "ext4")
    program.json("import", "p/i", str(archive))
    program.json("snapshot", "p/i", "p/c")
    program.json("commit", "p/c", "p/i2")
    answer = program.json("activate", "p/c")
    assert answer["already_active"] is False
    assert program.json("activate", "p/c")["already_active"] is True
    program.json("deactivate", "p/c")
    program.json("mount", "p/c", str(directory))
    program.json("umount", "p/c")
    program.json("list")
    exclusive = program.json("list", "p", "--exclusive")["volumes"]
    assert all(isinstance(volume["exclusive"], int) for volume in exclusive)
    program.json("rename", "p/c", "c2")
    program.json("resize", "p/c2", "256M")
    assert program.volume("p/c2")["size"] == 256 * MIB
    program.json("trim", "p/c2")
    program.json("diff", "p/i", "p/c2")
    program.json("delta", "p/i", "p/c2")
    exported = program.json("export", "p/c2", "-o", str(tmp_path / "c.tar"))
    assert (tmp_path / "c.tar").stat().st_size == exported["written"]
    program.json("check", "p")
    program.json("doctor")
    program.json("doctor", "p")
    program.json("remove", "p/c2")
    data, metadata = tmp_path / "data", tmp_path / "metadata"
    data.write_bytes(b"")
    os.truncate(data, 256 * MIB)
    metadata.write_bytes(b"")
    os.truncate(metadata, 8 * MIB)
    paths = ("--data", str(data), "--metadata", str(metadata))
    program.json("create-pool", "q", *paths, "--base-size", "64M")
    program.json("detach-pool", "q")
    program.json("attach-pool", "q", *paths)
    program.json("remove-pool", "q", "--yes")
    program.json("remove-pool", "p", "--yes")


@pytest.mark.thin_tools
def test_other_peoples_tools_accept_what_it_makes(program, tmp_path):
    create_pool(program)
    program("create", "p/v", "--size", "64M", "--fs", "ext4")
    program("snapshot", "p/v", "p/w")
    xml = tmp_path / "p.xml"
    xml.write_bytes(program("dump", "p").raw)
    metadata = Path(program.json("status", "p")["metadata"]["path"])
    program("detach-pool", "p")  # the tools read what no server writes any more
    check = subprocess.run(["thin_check", str(metadata)], capture_output=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    dumped = subprocess.run(["thin_dump", str(metadata)], capture_output=True, check=True)
    assert dumped.stdout == xml.read_bytes()
    assert program("dump", "--metadata", str(metadata)).raw == xml.read_bytes()
    assert program("check", "--metadata", str(metadata)).code == 0


# ---- wrong input: the right code, and nothing changed --------------------------------------


@pytest.fixture(scope="module")
def populated(shared, tmp_path_factory):
    """The shared pool with a volume, an image and a container, and an archive to import."""
    directory = tmp_path_factory.mktemp("populated")
    good = directory / "good.tar"
    good.write_bytes(a_tar({"f": b"x" * 100000}))
    shared("create", "p/v", "--size", "64M", "--fs", "ext4")
    shared("import", "p/i", str(good))
    shared("snapshot", "p/i", "p/c")
    (directory / "cut.tar").write_bytes(good.read_bytes()[:60000])
    (directory / "escape.tar").write_bytes(a_tar({"../escaped": b"x"}))
    (directory / "noise.tar").write_bytes(os.urandom(8192))
    (directory / "empty").write_bytes(b"")
    lying = good.read_bytes()
    wrong = {
        "blobs/sha256/" + "0" * 64: lying,
        "index.json": b"{}",
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
    }
    (directory / "lying.tar").write_bytes(a_tar(wrong))
    yield shared, directory
    shared("remove", "p/c", "p/i", "p/v", "--deactivate", code=None)


WRONG = [
    ("create p/v --size 1G", 4),
    ("create p/new --size 0", 2),
    ("create p/new --size 1000", 2),
    ("create p/new --size 9E", 2),
    ("create p/-new --size 1G", 2),
    ("create p/a/b --size 1G", 2),
    ("create nopool/new --size 1G", 3),
    ("create p/new --size 1G --fs ntfs", 2),
    ("snapshot p/nope p/new", 3),
    ("snapshot p/i p/c", 4),
    ("snapshot p/i q/new", 2),
    ("snapshot p/i p/new --size 1M", 2),
    ("snapshot p/i p/new --mount /nonexistent/dir", 3),
    ("commit p/nope p/new", 3),
    ("commit p/c p/i", 4),
    ("activate p/nope", 3),
    ("deactivate p/nope", 3),
    ("mount p/v /nonexistent/dir", 3),
    ("mount p/nope /", 3),
    ("umount p/nope", 3),
    ("list nopool", 3),
    ("status nopool", 3),
    ("remove p/nope", 3),
    ("remove p/v p/nope", 3),
    ("remove p/v nopool/x", 2),
    ("rename p/v i", 4),
    ("rename p/nope new", 3),
    ("rename p/v q/new", 2),
    ("resize p/v 1M", 2),
    ("resize p/v 1000", 2),
    ("resize p/i 1G", 8),
    ("resize p/nope 1G", 3),
    ("trim p/nope", 3),
    ("diff p/v p/nope", 3),
    ("diff p/v q/v", 2),
    ("delta p/v p/nope", 3),
    ("export p/nope -o {dir}/out", 3),
    ("export p/v -o {dir}/no/such/out", 3),
    ("import p/new {dir}/missing.tar", 3),
    ("import p/new {dir}/cut.tar", 7),
    ("import p/new {dir}/escape.tar", 7),
    ("import p/new {dir}/noise.tar", 7),
    ("import p/new {dir}/empty", 7),
    ("import p/new {dir}/lying.tar", 7),
    ("import p/new {dir}/good.tar --parent p/nope", 3),
    ("import p/new {dir}/good.tar --size 1M", 2),
    ("set p when-full=never", 2),
    ("set p colour=red", 2),
    ("set p min-free=2% when-full=never", 2),
    ("set nopool when-full=error", 3),
    ("extend-pool p --data-size 1M", 2),
    ("extend-pool p --metadata-size 1M", 2),
    ("extend-pool nopool", 3),
    ("create-pool p --size 1G", 4),
    ("create-pool new", 2),
    ("create-pool new --size 1G --engine zfs", 2),
    ("create-pool new --size 1K", 2),
    ("create-pool new --data {dir}/missing --metadata {dir}/missing2", 3),
    ("create-pool new --data {dir}/good.tar --metadata {dir}/empty", 4),
    ("create-pool new --data {dir}/good.tar", 2),
    ("remove-pool p", 2),
    ("remove-pool nopool --yes", 3),
    ("detach-pool nopool", 3),
    ("check nopool", 3),
    ("check --metadata {dir}/missing", 3),
    ("dump nopool", 3),
    ("doctor nopool", 3),
]


def test_existing_is_told_so_that_a_retry_can_compare(populated):
    program, _ = populated
    for arguments in (
        ("create", "p/v", "--size", "1G"),
        ("snapshot", "p/i", "p/v"),
        ("rename", "p/c", "v"),
        ("import", "p/v", "/"),
    ):
        existing = program.error(*arguments, code=4)["existing"]
        assert shapes.problems(existing, shapes.VOLUME) == []
        assert (existing["pool"], existing["name"]) == ("p", "v")
    existing = program.error("create-pool", "p", "--size", "1G", code=4)["existing"]
    assert (existing["pool"], existing["block_size"]) == ("p", 65536)


@pytest.mark.parametrize(("line", "code"), WRONG, ids=[line for line, _ in WRONG])
def test_wrong_input_is_refused_and_changes_nothing(populated, line, code):
    program, directory = populated
    begun = line.startswith("import")
    before = program.last_state or program.state()
    files = sorted(directory.iterdir())
    plain = program(*line.format(dir=directory).split(), code=code)
    assert plain.stdout == "", repr(plain)
    assert plain.stderr.startswith(f"thinpool {line.split()[0]}: "), repr(plain)
    assert plain.stderr.count("\n") == 1, repr(plain)
    after = program.last_state = program.state()
    if begun:  # and undone, in transactions of its own
        before, after = without_transactions(before), without_transactions(after)
    assert after == before
    assert sorted(directory.iterdir()) == files
    assert not (directory.parent / "escaped").exists()
    assert not (program.root / "pools" / "new").exists()


def test_a_device_that_carries_something_is_refused_and_named(program, tmp_path):
    data, metadata = tmp_path / "data", tmp_path / "metadata"
    with data.open("wb") as file:
        file.truncate(128 * MIB)
    with metadata.open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", str(data)], check=True)
    before = digest(data)
    paths = ("--data", str(data), "--metadata", str(metadata), "--base-size", "32M")
    error = program.error("create-pool", "p", *paths, code=4)
    assert "ext4" in error["message"]
    assert error["path"] == str(data)
    assert digest(data) == before
    assert metadata.read_bytes() == bytes(8 * MIB)
    assert program("pools").stdout == ""
    program("create-pool", "p", *paths, "--force")
    assert program("check", "p").code == 0


def damaged(metadata: bytes, how: str) -> bytes:
    """A metadata device with one thing wrong."""
    out = bytearray(metadata)
    if how == "zeros":
        return bytes(len(metadata))
    if how == "truncated":
        return metadata[: 3 * 4096]
    if how == "checksum":
        out[0] ^= 1
    elif how == "magic":
        out[32] ^= 1
    elif how == "version":
        out[40] ^= 0xFF
    return bytes(out)


@pytest.mark.parametrize("how", ["zeros", "truncated", "checksum", "magic", "version", "empty"])
def test_damaged_metadata_is_refused_and_left_alone(program, tmp_path, how):
    source = FIXTURES / "kernel-pools" / "simple.meta.xz"
    whole = lzma.decompress(source.read_bytes())
    metadata, data = tmp_path / "metadata", tmp_path / "data"
    metadata.write_bytes(b"" if how == "empty" else damaged(whole, how))
    with data.open("wb") as file:
        file.truncate(512 * MIB)
    before = digest(metadata)
    program.error("attach-pool", "p", "--data", str(data), "--metadata", str(metadata), code=7)
    assert digest(metadata) == before
    assert program("pools").stdout == ""
    report = program("check", "--metadata", str(metadata), code=7)
    assert "NOT CLEAN" in report.stdout or report.stderr != ""
    program("dump", "--metadata", str(metadata), code=7)


def test_a_second_opener_is_told_who_has_it(program, tmp_path):
    create_pool(program)
    status = program.json("status", "p")
    paths = ("--data", status["data"]["path"], "--metadata", status["metadata"]["path"])
    other = Thinpool(tmp_path / "other")
    error = other.error("--timeout", "1", "attach-pool", "q", *paths, code=5)
    assert error["message"]
    assert other("pools").stdout == ""
    assert program("check", "p").code == 0


def test_a_full_pool_takes_no_new_volumes_and_lets_go_of_old_ones(program):
    program("create-pool", "p", "--size", "256M", "--base-size", "64M", "--min-free", "10%")
    program("create", "p/filler", "--size", "1G")
    device = program("activate", "p/filler").stdout.strip()
    program("set", "p", "when-full=error")
    with Path(device).open("r+b", buffering=0) as file:
        written = 0
        try:
            while written < 512 * MIB:
                written += file.write(os.urandom(MIB))
            os.fsync(file.fileno())
        except OSError:
            pass
    assert program.json("status", "p")["mode"] in ("rw", "out_of_data_space")
    error = program.error("create", "p/new", "--size", "1M", code=6)
    assert error["type"] in ("data_space", "no_space", "metadata_space")
    program.error("snapshot", "p/base", "p/new", code=6)
    assert program.names() == {"base", "filler"}
    program("remove", "p/filler", "--deactivate")
    program("create", "p/new", "--size", "1M")
    assert program("check", "p").code == 0


def test_a_removed_backing_file_is_an_error_that_names_it(program):
    create_pool(program)
    status = program.json("status", "p")
    wait_for_servers(program.root)
    data = Path(status["data"]["path"])
    away = data.with_name("away")
    data.rename(away)
    try:
        error = program.error("create", "p/v", "--size", "1M", code=3)
        assert str(data) in error["message"]
        assert program.json("pools")["pools"][0]["mode"] == "fail"
    finally:
        away.rename(data)
    assert program.names() == {"base"}


# ---- active ones --------------------------------------------------------------------------


def test_active_and_mounted_volumes_are_busy(shared, tmp_path):
    shared("create", "p/busy", "--size", "64M", "--fs", "ext4")
    directory = tmp_path / "mnt"
    directory.mkdir()
    shared("mount", "p/busy", str(directory))
    shared.error("remove", "p/busy", code=5)
    shared.error("activate", "p/busy", "--read-only", code=5)
    shared.error("deactivate", "p/busy", code=5)
    shared.error("remove-pool", "p", "--yes", code=5)
    shared.error("detach-pool", "p", code=5)
    assert directory.is_mount()
    with (directory / "open").open("w"):
        shared.error("umount", "p/busy", code=5)
    shared("remove", "p/busy", "--deactivate")
    assert not directory.is_mount()
    assert "busy" not in shared.names()


def test_commands_can_be_repeated(shared, tmp_path):
    shared("create", "p/again", "--size", "64M", "--fs", "ext4")
    directory = tmp_path / "mnt"
    directory.mkdir()
    devices = {shared("activate", "p/again").stdout for _ in range(3)}
    assert len(devices) == 1
    for _ in range(2):
        shared("mount", "p/again", str(directory))
    assert sum(str(directory) in line for line in mounts(tmp_path)) == 1
    for _ in range(3):
        shared("umount", "p/again")
    for _ in range(3):
        shared("deactivate", "p/again")
    shared("remove", "p/again")
    error = shared.error("remove", "p/again", code=3)
    assert error["type"] == "not_found"


def test_mount_is_nodev_nosuid_unless_asked(shared, tmp_path):
    shared("create", "p/opts", "--size", "64M", "--fs", "ext4")
    directory = tmp_path / "mnt"
    directory.mkdir()

    def options() -> set[str]:
        line = next(each for each in mounts(tmp_path) if f" {directory} " in each)
        return set(line.split()[5].split(","))

    shared("mount", "p/opts", str(directory))
    assert {"rw", "nodev", "nosuid"} <= options()
    shared("umount", "p/opts")
    shared("mount", "p/opts", str(directory), "-o", "dev,suid,noatime")
    assert not {"nodev", "nosuid"} & options()
    assert "noatime" in options()
    shared("umount", "p/opts")
    shared("mount", "p/opts", str(directory), "--read-only")
    assert "ro" in options()
    shared("umount", "p/opts")
    assert shared.volume("p/opts")["device"] is None  # mount had activated it
    shared("remove", "p/opts")


def test_owner_and_mode_of_a_device(shared):
    shared("create", "p/owned", "--size", "1M")
    device = Path(
        shared("activate", "p/owned", "--owner", "1234:5678", "--mode", "0640").stdout.strip()
    )
    facts = device.stat()
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (1234, 5678, 0o640)
    shared("deactivate", "p/owned")
    shared("remove", "p/owned")


def test_a_snapshot_of_a_mounted_volume_is_clean(shared, tmp_path):
    shared("create", "p/live", "--size", "64M", "--fs", "ext4")
    directory = tmp_path / "mnt"
    directory.mkdir()
    shared("mount", "p/live", str(directory))
    (directory / "f").write_bytes(os.urandom(MIB))
    made = shared.json("snapshot", "p/live", "p/kept", "--read-only")["volume"]
    assert made["consistency"] == "frozen"
    device = shared("activate", "p/kept", "--read-only").stdout.strip()
    assert (
        subprocess.run(["e2fsck", "-fn", device], capture_output=True, check=False).returncode == 0
    )
    shared("remove", "p/kept", "p/live", "--deactivate")


def test_one_command_per_guest(shared, tmp_path):
    directory = tmp_path / "mnt"
    directory.mkdir()
    device = shared("snapshot", "p/base", "p/g1", "--activate", "--size", "512M").stdout.strip()
    assert Path(device).is_block_device()
    assert shared.volume("p/g1")["size"] == 512 * MIB
    second = shared("snapshot", "p/base", "p/g2", "--mount", str(directory))
    assert second.stdout.strip().endswith("/p/g2")
    assert directory.is_mount()
    shared("remove", "p/g1", "p/g2", "--deactivate")
    assert not directory.is_mount()


def test_a_renamed_active_volume_keeps_its_device(shared):
    shared("create", "p/old", "--size", "1M")
    number = shared.json("activate", "p/old")["number"]
    shared("rename", "p/old", "p/young")
    answer = shared.json("activate", "p/young")
    assert (answer["number"], answer["already_active"]) == (number, True)
    assert answer["device"].endswith("/p/young")
    assert Path(answer["device"]).is_block_device()
    assert not Path(answer["device"].replace("young", "old")).exists()
    shared("remove", "p/young", "--deactivate")


# ---- streams ------------------------------------------------------------------------------


def test_what_carries_no_filesystem_is_named_as_it_was_asked_for(shared):
    shared("create", "p/nofs", "--size", "1M")
    for arguments in (("export", "p/nofs"), ("diff", "p/nofs", "p/base"), ("mount", "p/nofs", "/")):
        refused = shared(*arguments, code=2)
        assert "p/nofs carries no filesystem" in refused.stderr
    shared("remove", "p/nofs")


def test_export_raw_is_the_device_and_sparse(shared, tmp_path):
    shared("create", "p/raw", "--size", "64M")
    device = shared("activate", "p/raw").stdout.strip()
    content = os.urandom(MIB)
    with Path(device).open("r+b", buffering=0) as file:
        file.seek(32 * MIB)
        file.write(content)
        os.fsync(file.fileno())
    out = tmp_path / "raw.img"
    shared("export", "p/raw", "--raw", "-o", str(out))
    assert out.stat().st_size == 64 * MIB
    assert out.stat().st_blocks * 512 < 8 * MIB
    whole = out.read_bytes()
    assert whole[32 * MIB : 33 * MIB] == content
    assert whole[: 32 * MIB] == bytes(32 * MIB)
    assert shared("export", "p/raw", "--raw").raw == whole
    shared("remove", "p/raw", "--deactivate")


def test_export_and_import_through_a_pipe(shared):
    tar = a_tar({"a": b"1", "d/b": b"22"})
    shared("import", "p/piped", "-", stdin=tar)
    again = shared("export", "p/piped").raw
    with tarfile.open(fileobj=io.BytesIO(again)) as exported:
        assert exported.extractfile("d/b").read() == b"22"
    shared("remove", "p/piped")


def test_a_reader_that_goes_away_stops_an_export(shared):
    shared("import", "p/long", "-", stdin=a_tar({"big": os.urandom(8 * MIB)}))
    before = shared.state()
    process = shared.start("export", "p/long")
    assert len(process.stdout.read(4096)) == 4096
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == -signal.SIGPIPE
    settled(shared, before)
    shared("remove", "p/long")


# ---- interrupted --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_import_leaves_nothing(shared, number):
    before = shared.state()
    process = shared.start("import", "p/half", "-", stdin=subprocess.PIPE)
    tar = a_tar({f"f{n}": os.urandom(MIB) for n in range(4)})
    process.stdin.write(tar[: 3 * MIB])
    process.stdin.flush()
    time.sleep(1.5)  # it is in the middle: it waits for more
    assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == b""
    assert err.decode() == "thinpool import: interrupted\n"
    settled(shared, before)


def test_a_killed_import_leaves_nothing(shared):
    before = shared.state()
    process = shared.start("import", "p/half", "-", stdin=subprocess.PIPE)
    process.stdin.write(a_tar({"f": os.urandom(4 * MIB)})[: 3 * MIB])
    process.stdin.flush()
    time.sleep(1.5)
    process.kill()
    process.communicate(timeout=60)
    settled(shared, before)


def settled(program: Thinpool, before: Any, seconds: float = 20) -> None:
    """See that what was begun is undone; the server may take a moment for it."""
    deadline = time.monotonic() + seconds
    before = without_transactions(before)
    while without_transactions(program.state()) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert without_transactions(program.state()) == before
    assert program("check", "p").code == 0


@pytest.mark.parametrize("delay", [0.4, 0.8, 1.2, 2.0])
def test_an_interrupted_create_pool_leaves_no_pool_or_a_whole_one(program, delay):
    process = program.start("create-pool", "p", "--size", "1G", "--base-size", "128M")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), err
    pools = program.json("pools")["pools"]
    if process.returncode == 130:
        assert pools == []
        assert not (program.root / "pools" / "p").exists()
    else:
        assert [pool["mode"] for pool in pools] == ["rw"]


def test_an_interrupted_export_leaves_no_file(shared, tmp_path):
    shared("import", "p/long", "-", stdin=a_tar({"big": os.urandom(64 * MIB)}))
    before = shared.state()
    process = shared.start("export", "p/long", "-o", str(tmp_path / "out.tar"))
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size for path in tmp_path.iterdir()):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130), err
    if process.returncode == 130:
        assert list(tmp_path.iterdir()) == []
    settled(shared, before)
    shared("remove", "p/long")


# ---- servers ------------------------------------------------------------------------------


def servers(root: Path) -> list[int]:
    """Processes of this root's pools."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if any("thinpool.server" in word for word in command) and str(root) in command:
                found.append(int(entry.name))
    return found


def wait_for_servers(root: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while servers(root) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert servers(root) == []


def test_servers_start_by_themselves_and_end_when_unused(program):
    create_pool(program)
    assert servers(program.root) != []
    wait_for_servers(program.root)
    assert program.names() == {"base"}


def test_commands_at_once_start_one_server_and_all_succeed(program):
    create_pool(program)
    wait_for_servers(program.root)
    running = [program.start("create", f"p/v{n}", "--size", "1M") for n in range(6)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, (out, err)
    assert program.names() == {"base", *(f"v{n}" for n in range(6))}
    supervisors = [
        pid
        for pid in servers(program.root)
        if b"thinpool.server.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(supervisors) <= 1


def test_the_same_name_at_once_is_made_once(shared):
    running = [shared.start("create", "p/one", "--size", "1M", "--json") for _ in range(4)]
    codes = []
    for process in running:
        process.communicate(timeout=60)
        codes.append(process.returncode)
    assert sorted(codes) == [0, 4, 4, 4]
    shared("remove", "p/one")


def test_a_pool_under_a_long_or_odd_path(tmp_path):
    root = tmp_path / ("long-" + "x" * 100) / "with space and ünïcode, 100%"
    program = Thinpool(root)
    create_pool(program)
    device = program("snapshot", "p/base", "p/c", "--activate").stdout.strip()
    assert Path(device).is_block_device()
    program("remove", "p/c", "--deactivate")
    program("remove-pool", "p", "--yes")


def test_two_roots_may_have_a_pool_of_the_same_name(program, tmp_path):
    create_pool(program)
    other = Thinpool(tmp_path / "other")
    create_pool(other)
    first = program("snapshot", "p/base", "p/c", "--activate").stdout.strip()
    second = other("snapshot", "p/base", "p/c", "--activate").stdout.strip()
    assert first != second
    assert Path(first).resolve() != Path(second).resolve()
    other("remove", "p/c", "--deactivate")
    assert Path(first).is_block_device()
    program("remove", "p/c", "--deactivate")
    other("remove-pool", "p", "--yes")


# ---- without root -------------------------------------------------------------------------


def can_run(command: list[str], options: dict[str, Any]) -> bool:
    try:
        return subprocess.run(command, check=False, **options).returncode == 0
    except PermissionError:
        return False


def test_what_needs_no_mount_works_without_root(tmp_path):
    """Create, snapshot, delta, check, dump and raw export as a user with no rights at all."""
    home = Path(f"/tmp/tpu-{os.getpid()}")  # noqa: S108 - a user's own, where that user may go
    home.mkdir(mode=0o700)
    os.chown(home, 65534, 65534)
    program = Thinpool(home / "root")
    as_user = {
        "user": 65534,
        "group": 65534,
        "extra_groups": [],
        "cwd": "/",
        "env": os.environ
        | {
            "HOME": str(home),
            "THINPOOL_CONFIG": str(home / "no-thinpool.toml"),  # where that user may look
            "THINPOOL_RUN": str(home / "run"),
        },
    }
    try:
        interpreter = [sys.executable, "-c", "import thinpool.cli.app"]
        if not can_run(interpreter, as_user):
            pytest.skip("another user may not run this interpreter")
        create = ("--size", "256M", "--base-size", "64M", "--min-free", "1%")
        program("create-pool", "p", *create, **as_user)
        program("create", "p/v", "--size", "16M", **as_user)
        program("snapshot", "p/v", "p/w", **as_user)
        program("snapshot", "p/base", "p/c", **as_user)
        program("delta", "p/v", "p/w", **as_user)
        assert b"<superblock" in program("dump", "p", **as_user).raw
        assert program("check", "p", **as_user).code == 0
        assert len(program("export", "p/v", "--raw", **as_user).raw) == 16 * MIB
        refused = program("activate", "p/v", code=8, **as_user)
        assert refused.stderr.count("\n") == 1
        program("remove", "p/v", "p/w", **as_user)
        program("remove-pool", "p", "--yes", **as_user)
    finally:
        wait_for_servers(program.root)
        subprocess.run(["rm", "-rf", str(home)], check=True)
