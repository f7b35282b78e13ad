"""Waiting for udev never lasts for ever, and leaves nothing; with and without a kernel."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from thinpool import errors
from thinpool.dm import cookies, nodes, udev
from thinpool.dm.cookies import QUIET, Cookie, UdevFlags
from thinpool.dm.events import DeviceEvent
from thinpool.dm.udev import UdevMode


@pytest.fixture
def semaphores():
    try:
        Cookie().close()
    except OSError as error:
        pytest.skip(f"System V semaphores: {error.strerror}")


def keys():
    lines = Path("/proc/sysvipc/sem").read_text().splitlines()[1:]
    return {line.split()[0] for line in lines}


def complete(cookie):
    """What udev's last rule does: find the semaphore by its key, and count it down."""
    found = cookies._libc.semget(0x0D4D0000 | cookie.id, 0, 0)
    assert found >= 0
    assert cookies._libc.semtimedop(found, cookies._Operation(0, -1, 0), 1, None) == 0


def test_a_cookie_names_its_semaphore_and_carries_flags(semaphores):
    with Cookie() as cookie:
        value = cookie.value(QUIET)
        assert value & 0xFFFF == cookie.id != 0
        assert value >> 16 == 0x40 | 0x02 | 0x04 | 0x08
        assert cookie.value(UdevFlags(0)) >> 16 == 0x40
        assert str(0x0D4D0000 | cookie.id) in keys()
    assert str(0x0D4D0000 | cookie.id) not in keys()


def test_a_wait_ends_when_all_that_is_expected_is_done(semaphores):
    with Cookie() as cookie:
        cookie.expect()
        cookie.expect()
        cookie.expect()
        cookie.forgo()
        assert not cookie.wait(0.01)
        threading.Timer(0.05, complete, [cookie]).start()
        threading.Timer(0.1, complete, [cookie]).start()
        began = time.monotonic()
        assert cookie.wait(10)
        assert 0.05 <= time.monotonic() - began < 5


def test_a_wait_without_expectations_is_over_at_once(semaphores):
    with Cookie() as cookie:
        assert cookie.wait(10)


def test_leftovers_that_somebody_removed_are_not_waited_for(semaphores):
    with Cookie() as cookie:
        cookie.expect()
        found = cookies._libc.semget(0x0D4D0000 | cookie.id, 0, 0)
        threading.Timer(0.05, cookies._libc.semctl, [found, 0, 0, 0]).start()
        assert cookie.wait(10)


def test_a_udevd_that_does_not_finish_is_an_error_that_names_the_device(semaphores, monkeypatch):
    monkeypatch.setattr(udev, "is_running", lambda: True)
    before = keys()
    with (
        pytest.raises(errors.TimeoutError_, match=r"/dev/mapper/x within 0.05 s") as caught,
        udev.wait_for(UdevMode.COOKIES, "x", quiet=True, seconds=0.05) as wait,
    ):
        wait.finished(0, raised=True)
    assert (caught.value.holder, caught.value.device) == ("udevd", "x")
    assert keys() == before


def test_a_udevd_that_died_meanwhile_is_not_waited_for(semaphores, monkeypatch):
    monkeypatch.setattr(udev, "is_running", lambda: False)
    monkeypatch.setattr(udev, "_SLICE_SECONDS", 0.01)
    with udev.wait_for(UdevMode.COOKIES, "x", quiet=True, seconds=60) as wait:
        wait.finished(0, raised=True)


def test_a_command_that_raised_no_event_is_not_waited_for(semaphores):
    with udev.wait_for(UdevMode.COOKIES, "x", quiet=True, seconds=60) as wait:
        assert wait.event_nr >> 16 == 0x4E
        wait.finished(0, raised=False)


class Announcements:
    """A monitor that says what it is given, then nothing."""

    def __init__(self, events):
        self.events = list(events)

    def next_event(self, timeout):
        return self.events.pop(0) if self.events else None

    def close(self):
        self.events = None


def event(number, sequence):
    return DeviceEvent(
        action="change", sequence=sequence, number=number, node="/dev/dm-0", name=None, uuid=None,
        cookie=None,
    )  # fmt: skip


def waiting(monkeypatch, tmp_path, events, *, queue=True):
    monitor = Announcements(events)
    monkeypatch.setattr(udev, "DeviceMonitor", lambda: monitor)
    monkeypatch.setattr(udev, "is_running", lambda: True)
    monkeypatch.setattr(udev, "_SEQUENCE", str(tmp_path / "seqnum"))
    (tmp_path / "seqnum").write_text("100\n")
    monkeypatch.setattr(udev, "_QUEUE", str(tmp_path / "queue"))
    if queue:
        (tmp_path / "queue").touch()
    return monitor


def test_the_announcement_is_the_devices_first_since_the_command(monkeypatch, tmp_path):
    monitor = waiting(
        monkeypatch, tmp_path, [event(7, 99), event(8, 101), event(7, 102), event(7, 103)]
    )
    with udev.wait_for(UdevMode.EVENTS, "x", quiet=True, seconds=60) as wait:
        assert wait.event_nr == 0
        wait.finished(7, raised=True)
        assert monitor.events == [event(7, 103)]
    assert monitor.events is None


def test_a_lost_announcement_is_made_up_for_by_an_empty_queue(monkeypatch, tmp_path):
    waiting(monkeypatch, tmp_path, [event(8, 101)], queue=False)
    with udev.wait_for(UdevMode.EVENTS, "x", quiet=True, seconds=60) as wait:
        wait.finished(7, raised=True)


def test_a_queue_that_stays_is_an_error(monkeypatch, tmp_path):
    waiting(monkeypatch, tmp_path, [])
    with (
        pytest.raises(errors.TimeoutError_, match="udevadm settle"),
        udev.wait_for(UdevMode.EVENTS, "x", quiet=True, seconds=0.01) as wait,
    ):
        wait.finished(7, raised=True)


def test_a_socket_without_a_daemon_is_no_udevd(monkeypatch, tmp_path):
    path = str(tmp_path / "control")
    monkeypatch.setattr(udev, "CONTROL_SOCKET", path)
    assert not udev.is_running()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(path)
        server.listen()
        assert udev.is_running()
    assert Path(path).exists()
    assert not udev.is_running()


def test_the_way_follows_from_what_runs_and_which_rules_there_are(
    semaphores, monkeypatch, tmp_path
):
    monkeypatch.delenv("DM_DISABLE_UDEV", raising=False)
    monkeypatch.setattr(udev, "_RULE_DIRECTORIES", (str(tmp_path / "a"), str(tmp_path / "b")))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(udev, "is_running", lambda: False)
    assert udev.detect() is UdevMode.NONE
    monkeypatch.setattr(udev, "is_running", lambda: True)
    assert udev.detect() is UdevMode.EVENTS
    (tmp_path / "b/95-dm-notify.rules").touch()
    assert udev.detect() is UdevMode.COOKIES
    (tmp_path / "b/55-thinpool.rules").touch()
    assert udev.detect() is UdevMode.EVENTS
    (tmp_path / "a/55-thinpool.rules").symlink_to("/dev/null")
    assert udev.detect() is UdevMode.COOKIES
    monkeypatch.setenv("DM_DISABLE_UDEV", "1")
    assert udev.detect() is UdevMode.NONE


@pytest.fixture
def folder(monkeypatch, tmp_path, require):
    """A /dev/mapper of its own, where block nodes can be made."""
    require("root")
    monkeypatch.setattr(nodes, "DIRECTORY", str(tmp_path))
    return tmp_path


def test_nodes_are_made_replaced_and_removed(folder):
    path = nodes.make("x", os.makedev(253, 70))
    assert nodes.leads_to(path, os.makedev(253, 70))
    assert nodes.make("x", os.makedev(253, 71)) == path
    assert nodes.leads_to(path, os.makedev(253, 71))
    (folder / "y").symlink_to("../dm-gone")
    nodes.make("y", os.makedev(253, 72))
    assert nodes.leads_to(str(folder / "y"), os.makedev(253, 72))
    nodes.remove("x", exists=lambda: True)
    assert (folder / "x").exists()
    nodes.remove("x", exists=lambda: False)
    nodes.remove("x", exists=lambda: False)
    assert sorted(entry.name for entry in folder.iterdir()) == ["y"]
