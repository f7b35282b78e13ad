"""tools/kernel-run: a command there is like a command here, and a guest ends with its program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kernel_vm, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).resolve().parents[2] / "tools/kernel-run"
TIMEOUT = 300


def kernel_run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def test_a_command_has_its_streams_status_environment_disks_and_shares(tmp_path: Path) -> None:
    disk, share = tmp_path / "disk", tmp_path / "share"
    disk.write_bytes(b"before".ljust(1 << 20, b"\0"))
    share.mkdir()
    script = f"""
        cat; echo to-stderr >&2
        echo "release $(uname -r) word '$WORD' disks $KR_DISK0 $KR_DISK1 in $PWD"
        dd if=$KR_DISK0 bs=6 count=1 2>/dev/null; echo
        echo after | dd of=$KR_DISK0 conv=notrunc,fsync 2>/dev/null
        blockdev --getsize64 $KR_DISK1
        echo shared >{share}/file
        echo gone >{tmp_path}/gone
        modprobe dm-thin-pool && dmsetup targets | grep -c thin
        exit 7
    """
    done = kernel_run(
        "--disk", str(disk), "--disk", "8M", "--share", str(share), "--cwd", str(tmp_path),
        "--env", "WORD=a 'b' $c", "--", "sh", "-c", script, stdin="from stdin\n",
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stderr == "to-stderr\n"
    first, second, *rest = done.stdout.splitlines()
    assert first == "from stdin"
    assert second.startswith("release ")
    assert second.endswith(f"word 'a 'b' $c' disks /dev/vda /dev/vdb in {tmp_path}")
    assert os.uname().release not in second
    assert rest == ["before", str(8 << 20), "2"]
    assert disk.read_bytes()[:6] == b"after\n"
    assert (share / "file").read_text() == "shared\n"
    assert not (tmp_path / "gone").exists(), "only shares and disks outlive the guest"


def test_udevd_runs_where_it_is_asked_for() -> None:
    script = "udevadm control --ping && ls /dev/disk/by-id && readlink -f /dev/disk/by-id/*"
    done = kernel_run("--udev", "--disk", "8M", "--", "sh", "-c", script)
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == ["virtio-scratch0", "/dev/vda"]


def test_a_command_that_takes_too_long_is_stopped_and_says_so() -> None:
    begin = time.monotonic()
    done = kernel_run("--timeout", "15", "--", "sh", "-c", "echo begun; sleep 600")
    assert done.returncode == 124
    assert done.stdout == "begun\n"
    assert "not done within 15" in done.stderr
    assert time.monotonic() - begin < 120


def test_a_guest_that_dies_shows_its_console() -> None:
    done = kernel_run("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60")
    assert done.returncode == 125
    assert "the guest ended without a status" in done.stderr
    assert "Hardware name: QEMU" in done.stderr, "the end of the kernel's own words"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_guest_ends_with_its_program(number: signal.Signals, tmp_path: Path) -> None:
    """Killing the program is how tests cut the power: what had reached the disk is there."""
    disk = tmp_path / "disk"
    script = "echo written | dd of=$KR_DISK0 conv=fsync 2>/dev/null; echo ready; sleep 600"
    disk.write_bytes(bytes(1 << 20))
    with subprocess.Popen(
        [PROGRAM, "--disk", disk, "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        machines = children(program.pid)
        assert machines
        program.send_signal(number)
        program.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in machines) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in machines)
    assert disk.read_bytes()[:8] == b"written\n"


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel-dir", "{folder}"], "no kernel under {folder}"),
        (["--disk", "much"], "--disk much: neither a file nor a size"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    filled = [argument.format(folder=tmp_path) for argument in arguments]
    done = kernel_run(*filled, "--", "true")
    assert done.returncode == 125
    assert said.format(folder=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_without_programs_it_says_which_package() -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--", "true"],
        env={"PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 125
    assert "(Debian: " in done.stderr
