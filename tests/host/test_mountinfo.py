"""Mount tables, without root."""

from __future__ import annotations

import os

from thinpool.host import mountinfo

TABLE = b"""\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
38 22 0:34 / /run rw,nosuid shared:5 master:2 propagate_from:1 - tmpfs tmpfs rw,size=1k
40 38 7:3 /sub\\040dir /mnt/a\\040b\\011c\\134d\\012e ro,nodev - xfs /dev/loop3 rw,attr2

truncated 1
x 38 7:3 / /a rw - xfs /dev/loop3 rw
40 38 7 / /a rw - xfs /dev/loop3 rw
40 38 7:3 / /a rw - xfs
41 38 0:50 / /mnt/fuse rw - fuse.thinpool thin\\040pool ro
"""


def test_every_field_is_read_and_escapes_are_undone():
    root, run, xfs, fuse = mountinfo.parse_mountinfo(TABLE)
    assert root.device == os.makedev(254, 0)
    assert run.optional == ("shared:5", "master:2", "propagate_from:1")
    assert xfs.mount_point == "/mnt/a b\tc\\d\ne"
    assert xfs.root == "/sub dir"
    assert xfs.read_only
    assert (xfs.mount_id, xfs.parent_id) == (40, 38)
    assert fuse.source == "thin pool"
    assert fuse.read_only
    assert not root.read_only


def test_a_path_lies_in_the_longest_and_latest_mount():
    table = mountinfo.parse_mountinfo(TABLE + b"42 41 0:51 / /mnt/fuse rw - tmpfs t rw\n")

    def fstype(path):
        found = mountinfo.mount_of(path, table)
        return None if found is None else found.fstype

    assert fstype("/mnt/fuse/file") == "tmpfs"
    assert fstype("/mnt/fused") == "ext4"
    assert fstype("/run") == "tmpfs"
    assert fstype("/") == "ext4"
    assert [entry.has_server for entry in table] == [False, False, False, True, False]


def test_names_that_are_not_utf8_survive():
    (entry,) = mountinfo.parse_mountinfo(b"1 0 8:1 / /\xff\\040x rw - ext4 /dev/sda rw\n")
    assert os.fsencode(entry.mount_point) == b"/\xff x"


def test_the_own_namespace_is_listed_once_and_first():
    found = list(mountinfo.namespaces())
    inodes = [inode for inode, _pid in found]
    assert found[0] == (os.stat("/proc/self/ns/mnt").st_ino, os.getpid())
    assert len(set(inodes)) == len(inodes)


def test_the_root_directory_is_a_mount():
    entry = mountinfo.mount_at("/")
    assert entry is not None
    assert entry.mount_point == "/"
