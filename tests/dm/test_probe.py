"""What is said where there is no device-mapper, or not for this user; what doctor makes of it."""

from __future__ import annotations

import errno
import os

import pytest

from thinpool import errors
from thinpool.api.care import host_findings
from thinpool.dm import DeviceMapper, control, probe, udev


@pytest.fixture
def no_node(monkeypatch, tmp_path):
    """A host without the control device's node, whose kernel answers as the test wants."""
    path = tmp_path / "mapper/control"
    monkeypatch.setattr(control, "CONTROL", str(path))
    made = []

    def mknod(name, mode, device):
        made.append((name, mode, device))
        path.write_bytes(b"")  # not touch: it opens as the client does

    monkeypatch.setattr(os, "mknod", mknod)
    return made


def opening_fails(monkeypatch, number):
    real = os.open

    def opened(path, *arguments, **named):
        if str(path) == control.CONTROL:
            raise OSError(number if os.path.exists(path) else errno.ENOENT, "no", path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", opened)


def test_a_kernel_without_device_mapper_is_said_and_leaves_no_node(no_node, monkeypatch):
    opening_fails(monkeypatch, errno.ENODEV)
    with pytest.raises(
        errors.UnsupportedHostError, match="dm-thin-pool, or use the user"
    ) as caught:
        DeviceMapper()
    assert caught.value.missing == "device-mapper"
    assert [(mode & 0o170000, device) for _, mode, device in no_node] == [
        (0o020000, os.makedev(10, 236))
    ]
    assert not os.path.lexists(os.path.dirname(control.CONTROL))


def test_the_nodes_number_is_what_the_kernel_registered(no_node, monkeypatch, tmp_path):
    real = open

    def opened(path, *arguments, **named):
        tables = {
            "/proc/devices": "Character devices:\n  1 mem\n 11 misc\n",
            "/proc/misc": "229 fuse\n 77 device-mapper\n",
        }
        if path in tables:
            (tmp_path / "table").write_text(tables[path])
            path = tmp_path / "table"
        return real(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", opened)
    with pytest.raises(errors.UnsupportedHostError):
        DeviceMapper()  # the "node" is a plain file here
    assert no_node[0][2] == os.makedev(11, 77)


def test_a_user_who_may_not_is_told_what_it_takes(no_node, monkeypatch):
    os.makedirs(os.path.dirname(control.CONTROL))
    with open(control.CONTROL, "w"):
        opening_fails(monkeypatch, errno.EACCES)
    with pytest.raises(errors.NotPermittedError, match="root"):
        DeviceMapper()
    assert no_node == []


def test_a_kernel_of_another_interface_is_said(no_node, monkeypatch):
    with open(os.devnull) as device:
        monkeypatch.setattr(control, "open_control", lambda: os.dup(device.fileno()))
        with pytest.raises(errors.UnsupportedHostError, match="another interface") as caught:
            DeviceMapper()
    assert caught.value.command == "VERSION"


def test_doctor_says_whether_the_kernel_engine_works():
    found = {finding.subject: finding for finding in host_findings()}
    reason = probe.device_mapper()
    assert found["device-mapper"].state == ("ok" if reason is None else "missing")
    assert found["device-mapper"].message == (reason or found["device-mapper"].message)
    assert ("udev-rules" in found) == (reason is None)


def test_rules_that_are_missing_or_old_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(udev, "_RULE_DIRECTORIES", (str(tmp_path),))
    monkeypatch.setattr(udev, "is_running", lambda: False)
    assert probe.udev_rules() is None
    monkeypatch.setattr(udev, "is_running", lambda: True)
    assert "not installed" in probe.udev_rules()
    (tmp_path / udev.OWN_RULES).write_text("# old\n")
    assert "another version" in probe.udev_rules()
    with open(probe.RULES_PATH) as file:
        (tmp_path / udev.OWN_RULES).write_text(file.read())
    assert probe.udev_rules() is None


def test_our_rules_are_read_between_device_mappers_and_those_that_heed_flags():
    order = sorted(
        ["55-dm.rules", udev.OWN_RULES, "56-lvm.rules", "60-persistent-storage-dm.rules"]
    )
    assert order.index(udev.OWN_RULES) == 1
    with open(probe.RULES_PATH) as file:
        text = file.read()
    assert 'ATTR{dm/uuid}!="THINPOOL-*"' in text
