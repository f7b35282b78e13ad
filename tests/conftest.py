"""What every test shares: capability probes, seeds, a private environment, and a check for leaks.

A test that needs something of the host says so in one of two ways:

    pytestmark = [pytest.mark.fuse, pytest.mark.loop]     # a marker that is also a capability
    def test_x(require): require("xfs", "fio")            # or the fixture, anywhere

``from tests.conftest import require`` works too, for helpers. What is missing skips the test with
its reason; capabilities named in ``THINPOOL_REQUIRE=fuse,loop`` fail it instead, so that no skip
goes unseen where the host is meant to have them. A name that is no capability is an error.

Tests marked ``dm`` run in a Debian kernel under QEMU where the host's has no device-mapper:
``tests/guest.py``.

Each session (each xdist worker) has a run directory and a root of its own, and its children carry
its token in their environment. When it ends, no mount, loop device or process of its may be left.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPOSITORY = Path(__file__).resolve().parent.parent
TOKEN_VARIABLE = "THINPOOL_TEST_TOKEN"  # noqa: S105 - no secret: it marks whose child a process is
LEAK_WAIT_SECONDS = 15.0

# Children must import the package that is under test, not a folder they happen to stand in.
os.environ["PYTHONSAFEPATH"] = "1"
# Servers of tests need not linger as long as those of people; a test of lingering sets its own.
os.environ.setdefault("THINPOOL_LINGER", "2")

# A job that a shell started in the background ignores these, and so would all that tests start.
for _number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(
            _number,
            signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL,
        )


# ---- capabilities ---------------------------------------------------------------------------


def _programs(*names: str) -> str | None:
    missing = [name for name in names if shutil.which(name) is None]
    return f"no {', '.join(missing)} on this host" if missing else None


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


def _kernel_filesystem(name: str) -> str | None:
    def known() -> bool:
        lines = Path("/proc/filesystems").read_text().splitlines()
        return name in {line.split("\t")[-1] for line in lines}

    if not known():
        _modprobe(name)
    return None if known() else f"this kernel has no {name}"


def _device(path: str, flags: int) -> str | None:
    try:
        os.close(os.open(path, flags | os.O_CLOEXEC))
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def _file(path: str) -> str | None:
    return None if Path(path).exists() else f"no {path} on this host"


def _fuse() -> str | None:
    return _root() or _kernel_filesystem("fuse") or _device("/dev/fuse", os.O_RDWR)


def _modprobe(name: str) -> None:
    """Load a module that udev or a first use would, where there is such a program and module."""
    if os.geteuid() == 0 and (modprobe := shutil.which("modprobe")):
        subprocess.run([modprobe, "-q", name], check=False, stdin=subprocess.DEVNULL)


def _loop() -> str | None:
    if not Path("/dev/loop-control").exists():
        _modprobe("loop")
    return _root() or _device("/dev/loop-control", os.O_RDWR)


def _dm() -> str | None:
    """A kernel with the thin-pool target, and the right to use it."""
    if (lacking := _root()) is not None:
        return lacking
    if not Path("/sys/module/dm_thin_pool").exists():
        _modprobe("dm-thin-pool")
    if not Path("/sys/module/dm_thin_pool").exists():
        return f"kernel {os.uname().release} has no thin-pool target"
    return _device("/dev/mapper/control", os.O_RDWR)


def _kernel_vm() -> str | None:
    """What tools/kernel-run needs to boot a kernel of Debian's."""
    if os.environ.get("KERNEL_RUN"):
        return "this is a guest already"
    lacking = _programs("qemu-system-x86_64", "busybox", "depmod", "mkfs.ext4")
    if lacking is not None:
        return lacking
    folder = Path(os.environ.get("THINPOOL_KERNEL_DIR") or REPOSITORY / "build/kernel")
    if not list(folder.glob("boot/vmlinuz-*")):
        return f"no kernel unpacked in {folder} (tools/setup.sh fetches one)"
    return None


def _udev() -> str | None:
    return None if Path("/run/udev/control").exists() else "no udevd runs"


def _ext4() -> str | None:
    return _programs("mkfs.ext4", "e2fsck") or _kernel_filesystem("ext4")


def _xfs() -> str | None:
    return _programs("mkfs.xfs", "xfs_repair") or _kernel_filesystem("xfs")


def _overlay() -> str | None:
    return _root() or _kernel_filesystem("overlay")


def _punch() -> str | None:
    """Holes in files where tests write: the pool's passdown is tested on them."""
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        offset = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
    return None if offset == 0 else f"no sparse files under {tempfile.gettempdir()}"


def _docker() -> str | None:
    """A dockerd that still has graph-driver plugins (up to 27), and a static busybox to run."""
    lacking = _root() or _programs("/usr/sbin/dockerd", "/usr/bin/docker", "/bin/busybox")
    if lacking is not None:
        return lacking
    said = subprocess.run(
        ["/usr/sbin/dockerd", "--version"], capture_output=True, text=True, check=False
    ).stdout
    found = re.search(r"version (\d+)\.", said)
    if found is None:
        return f"dockerd says {said!r:.60}"
    return None if int(found[1]) < 28 else f"{said.strip()} has no graph-driver plugins"


def _bench_programs() -> str | None:
    """The C core's programs that print what something costs: make test-c builds them."""
    folder = os.environ.setdefault(
        "THINPOOL_BENCH_PROGRAMS", str(REPOSITORY / "build/normal/csrc/tests")
    )
    missing = not os.access(Path(folder) / "bench_metadata", os.X_OK)
    return f"no bench_metadata in {folder}: make test-c builds it" if missing else None


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "bench_programs": _bench_programs,
    "dm": _dm,
    "docker": _docker,
    "ext4": _ext4,
    "fio": lambda: _programs("fio"),
    "fuse": _fuse,
    "kernel_vm": _kernel_vm,
    "loop": _loop,
    "overlay": _overlay,
    "registry": lambda: _programs("docker-registry"),
    "root": _root,
    "skopeo": lambda: _programs("skopeo"),
    "sparse": _punch,
    "systemd": lambda: _file("/lib/systemd/systemd") or _programs("systemctl", "systemd-analyze"),
    "thin_tools": lambda: _programs("thin_check", "thin_dump", "thin_restore"),
    "udev": _udev,
    "xfs": _xfs,
}


@functools.cache
def missing(name: str) -> str | None:
    """Why this host lacks a capability; None where it has it."""
    return CAPABILITIES[name]()


def required_names() -> frozenset[str]:
    """The capabilities whose absence is a failure, from THINPOOL_REQUIRE."""
    text = os.environ.get("THINPOOL_REQUIRE", "")
    names = frozenset(part.strip() for part in text.split(",") if part.strip())
    if unknown := names - CAPABILITIES.keys():
        known = ", ".join(CAPABILITIES)
        message = f"THINPOOL_REQUIRE names {', '.join(sorted(unknown))}; known are {known}"
        raise pytest.UsageError(message)
    return names


def require(*names: str) -> None:
    """Skip the running test, or fail it under THINPOOL_REQUIRE, unless this host has all names."""
    for name in names:
        if name not in CAPABILITIES:
            known = ", ".join(CAPABILITIES)
            pytest.fail(f"require({name!r}): no such capability; known are {known}")
        if (reason := missing(name)) is None:
            continue
        if name in required_names():
            pytest.fail(f"THINPOOL_REQUIRE wants {name}, but: {reason}", pytrace=False)
        pytest.skip(f"needs {name}: {reason}")


@pytest.fixture(name="require", scope="session")
def _require_fixture() -> Callable[..., None]:
    return require


# ---- the session ----------------------------------------------------------------------------


def _profile() -> str:
    return os.environ.get("THINPOOL_PROFILE") or ("ci" if os.environ.get("CI") else "dev")


def _base_seed() -> int:
    return int(os.environ.get("THINPOOL_SEED", "1"), 0)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the Hypothesis profile and refuse unknown capabilities before anything runs."""
    required_names()
    if _profile() not in {"dev", "ci", "soak"}:
        message = f"THINPOOL_PROFILE={_profile()}: it is dev, ci or soak"
        raise pytest.UsageError(message)
    if config.pluginmanager.hasplugin("hypothesispytest"):
        _choose_hypothesis_profile(config)
    guest.configure(config)


def _choose_hypothesis_profile(config: pytest.Config) -> None:
    # Not at the top: in a guest, where it is not used, importing it takes four seconds.
    from hypothesis import settings  # noqa: PLC0415

    settings.register_profile("dev", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    settings.register_profile(
        "soak", deadline=None, max_examples=5000, stateful_step_count=200, print_blob=True
    )
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile(_profile())


def _dm_tests_run() -> str:
    """Where tests that need device-mapper run, for people."""
    if missing("dm") is None:
        return "directly: this kernel has device-mapper"
    if missing("kernel_vm") is None:
        return f"in a Debian kernel under QEMU: {missing('dm')}"
    return f"nowhere: {missing('dm')}; {missing('kernel_vm')}"


def pytest_report_header() -> list[str]:
    """Say what the run depends on."""
    lacking = [f"{name} ({missing(name)})" for name in CAPABILITIES if missing(name)]
    settings = (
        f"THINPOOL_SEED={_base_seed()} THINPOOL_PROFILE={_profile()} "
        f"THINPOOL_REQUIRE={','.join(sorted(required_names())) or '-'}"
    )
    return [
        f"thinpool: {settings}",
        f"thinpool: this host lacks {'; '.join(lacking) if lacking else 'nothing'}",
        f"thinpool: device-mapper tests run {_dm_tests_run()}",
    ]


def _runs_in_guest(item: pytest.Item) -> bool:
    """Whether an item needs device-mapper, not to be had here but in a guest."""
    if item.get_closest_marker("dm") is None or missing("kernel_vm") is not None:
        return False
    wants_udev = item.get_closest_marker("udev") is not None
    return missing("dm") is not None or (wants_udev and missing("udev") is not None)


def _apply_groups(items: list[pytest.Item]) -> None:
    """Append groups to the node ids that xdist schedules by.

    That is what xdist 3.8 means to do, but it writes to where pytest 9.2 no longer keeps an id.
    """
    for item in items:
        if (mark := item.get_closest_marker("xdist_group")) and hasattr(item, "_id"):
            item._id = type(item.id).parse(f"{item.nodeid}@{mark.args[0]}")


@pytest.hookimpl(tryfirst=True)  # before xdist's, which reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need device-mapper run one after another: in one guest, or in one worker."""
    for item in items:
        if _runs_in_guest(item):
            guest.assign(item)
        elif item.get_closest_marker("dm"):
            item.add_marker(pytest.mark.xdist_group("dm"))
    if hasattr(config, "workerinput") and config.getvalue("loadgroup"):
        _apply_groups(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test that needs device-mapper in a guest, where the host has none."""
    if not _runs_in_guest(item):
        return None
    guest.run_item(item, nextitem)
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A marker that is a capability is a requirement."""
    require(*sorted({mark.name for mark in item.iter_markers()} & CAPABILITIES.keys()))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for this test: the same in every run with the same THINPOOL_SEED; shown on failure."""
    value = zlib.crc32(f"{_base_seed()}:{request.node.nodeid}".encode())
    shown = f"seed {value} (THINPOOL_SEED={_base_seed()})"
    print(shown)  # noqa: T201 - pytest shows it when the test fails
    return value


@pytest.fixture
def rng(seed: int) -> random.Random:
    """Randomness from the test's seed."""
    return random.Random(seed)


# ---- leaks ----------------------------------------------------------------------------------


def _own_processes(token: str) -> dict[int, str]:
    wanted = f"{TOKEN_VARIABLE}={token}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended, or is another user's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                if command:  # an empty one is a zombie or about to be
                    found[int(entry.name)] = command.strip()
    return found


def _mounts_under(folders: list[Path]) -> list[str]:
    prefixes = tuple(f"{folder}/" for folder in folders)
    targets = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split()[4].encode().decode("unicode_escape")
        if f"{target}/".startswith(prefixes):
            targets.append(target)
    return targets


def _loops_over(folders: list[Path]) -> list[str]:
    prefixes = tuple(f"{folder}/" for folder in folders)
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # detached between glob and read
            if backing.read_text().startswith(prefixes):
                found.append(f"/dev/{backing.parent.parent.name}")
    return found


def leaks(token: str, folders: list[Path]) -> list[str]:
    """What a session with this token, working in these folders, has left behind."""
    return [
        *(f"process {pid}: {command}" for pid, command in _own_processes(token).items()),
        *(f"mount {target}" for target in _mounts_under(folders)),
        *(f"loop device {device}" for device in _loops_over(folders)),
    ]


def _clean_up(token: str, folders: list[Path]) -> None:
    """Take down what was left, so that one leak does not spoil the next session."""
    for target in reversed(_mounts_under(folders)):
        subprocess.run(["umount", "-l", target], check=False)
    for device in _loops_over(folders):
        subprocess.run(["losetup", "-d", device], check=False)
    for pid in _own_processes(token):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def _private_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run directory, root and token of this session; nothing of it may be left at the end."""
    token = secrets.token_hex(8)
    # Short, since a socket's path has at most 107 bytes.
    run = Path(tempfile.mkdtemp(prefix="tpt-"))
    folders = [run, tmp_path_factory.getbasetemp().resolve()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, token)
        patch.setenv("THINPOOL_RUN", str(run / "run"))
        patch.setenv("THINPOOL_ROOT", str(run / "root"))
        yield
        deadline = time.monotonic() + LEAK_WAIT_SECONDS
        while (left := leaks(token, folders)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            _clean_up(token, folders)
    if not left:  # else something may still be mounted there
        shutil.rmtree(run)
    else:
        pytest.fail("left behind by this session:\n  " + "\n  ".join(left), pytrace=False)
