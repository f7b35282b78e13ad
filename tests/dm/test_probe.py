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


@pytest.fixture
def rules(monkeypatch, tmp_path):
    """A host's directories of rules: an administrator's, and one under /run."""
    folders = (tmp_path / "etc", tmp_path / "run")
    monkeypatch.setattr(udev, "_RULE_DIRECTORIES", tuple(map(str, folders)))
    monkeypatch.setattr(udev, "_VOLATILE_RULES", str(folders[1]))
    monkeypatch.setattr(udev, "is_running", lambda: True)
    asked = []
    monkeypatch.setattr(udev, "run_program", lambda *arguments, **_: asked.append(arguments))
    folders[0].mkdir()
    return (*(folder / udev.OWN_RULES for folder in folders), asked)


def test_rules_are_put_where_they_lack_and_udevd_told_once(rules):
    theirs, ours, asked = rules
    assert udev.put_rules()
    assert udev.put_rules()
    assert asked == [("udevadm", ["control", "--reload"])]
    with open(udev.RULES_PATH) as file:
        assert ours.read_text() == file.read()
    assert [path.name for path in ours.parent.iterdir()] == [udev.OWN_RULES]
    ours.write_text("# of an older version\n")
    assert udev.put_rules()
    assert len(asked) == 2
    assert not theirs.exists()
    assert probe.udev_rules() is None


def test_an_administrators_rules_are_left_alone(rules):
    theirs, ours, asked = rules
    theirs.write_text("# mine\n")
    assert udev.put_rules()
    assert not ours.exists()
    assert "another version" in probe.udev_rules()
    theirs.unlink()
    theirs.symlink_to(os.devnull)
    assert not udev.put_rules()
    assert not ours.exists()
    assert "masked" in probe.udev_rules()
    assert asked == []


def test_where_rules_cannot_be_put_that_is_no_error(rules, monkeypatch):
    _, ours, _ = rules
    ours.parent.write_text("no directory")
    assert not udev.put_rules()

    def fails(*_, **__):
        raise errors.UnsupportedHostError("udevadm is not installed", missing="udevadm")

    ours.parent.unlink()
    monkeypatch.setattr(udev, "run_program", fails)
    assert not udev.put_rules()


def test_without_udevd_nothing_is_put(rules, monkeypatch):
    monkeypatch.setattr(udev, "is_running", lambda: False)
    assert udev.prepare() is udev.UdevMode.NONE
    assert not rules[1].exists()
    assert probe.udev_rules() is None


def test_our_rules_are_read_between_device_mappers_and_those_that_heed_flags():
    order = sorted(
        ["55-dm.rules", udev.OWN_RULES, "56-lvm.rules", "60-persistent-storage-dm.rules"]
    )
    assert order.index(udev.OWN_RULES) == 1
    with open(udev.RULES_PATH) as file:
        text = file.read()
    assert 'ATTR{dm/uuid}!="THINPOOL-*"' in text
