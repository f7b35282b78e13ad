"""Layers made to break out, to lie, or to exhaust: a clear error or a harmless result, always.

Each runs in a jail beside a canary tree that it tries to reach; whatever happens, the canary and
everything else outside the root are unchanged, in content, metadata and names. The root itself
holds what an evil lower layer could have left: links out of it, a device, a fifo.
"""

from __future__ import annotations

import itertools
import os
import random
import stat
import zlib
from typing import TYPE_CHECKING

import pytest
import zstandard

from tests.oci.tarbuild import BLOCK, Tar, base256, extract, header, padded, record
from tests.oci.trees import state
from thinpool.errors import ArchiveError, ThinpoolError
from thinpool.oci.extract import Extractor, Limits, clean
from thinpool.oci.streams import IteratorSource, decompressed
from thinpool.oci.tar import TarLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from thinpool.oci.extract import Extracted


class Jail:
    """A root, a canary outside, and what must not change."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.root = top / "jail/deep/root"
        self.canary = top / "canary"
        self.root.mkdir(parents=True)
        (self.canary / "dir/inner").mkdir(parents=True)
        (self.canary / "victim").write_bytes(b"untouched")
        (self.canary / "dir/inner/file").write_bytes(b"untouched")
        (self.canary / "link").symlink_to("victim")
        # The lower layer.
        for name, target in (("out", "../../../canary"), ("abs", str(self.canary)),
                             ("victim", "../../../canary/victim"), ("up", ".."),
                             ("slash", "/"), ("loop", "loop")):  # fmt: skip
            (self.root / f"lower-{name}").symlink_to(target)
        (self.root / "lower-dir/sub").mkdir(parents=True)
        (self.root / "lower-dir/file").write_bytes(b"lower")
        os.mkfifo(self.root / "lower-fifo")
        if os.geteuid() == 0:
            os.mknod(self.root / "lower-device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        self.before = self.outside()

    def outside(self) -> dict[bytes, dict]:
        found = state(self.top, closed=b"jail/deep/root")
        del found[b"jail/deep/root"]  # its own metadata may change
        return found

    def apply(self, data: bytes, **options) -> Extracted | ThinpoolError:
        """What came of it; anything but a typed error or a result is a failure of the test."""
        try:
            result: Extracted | ThinpoolError = extract(self.root, data, **options)
        except ThinpoolError as error:
            result = error
        assert self.outside() == self.before
        if isinstance(result, ThinpoolError):
            assert result.message
            assert result.attributes.get("member") is not None
        return result


@pytest.fixture
def jail(tmp_path) -> Jail:
    return Jail(tmp_path)


def member(tar: Tar, kind: str, name: bytes) -> Tar:
    """A member that would do harm if its name led outside."""
    parent, slash, base = name.rpartition(b"/")
    actions: dict[str, Callable[[], Tar]] = {
        "file": lambda: tar.file(name, b"pwned", mode=0o4777),
        "directory": lambda: tar.dir(name, mode=0o777, uid=1, mtime=1),
        "symlink": lambda: tar.symlink(name, b"/etc/passwd"),
        "hard link": lambda: tar.link(name, b"lower-dir/file"),
        "link target": lambda: tar.link(b"stolen", name).file(b"stolen", b"pwned"),
        "fifo": lambda: tar.add(name, kind=b"6"),
        "device": lambda: tar.add(name, kind=b"3", device=(1, 3)),
        "whiteout": lambda: tar.file(parent + slash + b".wh." + base),
        "opaque": lambda: tar.file(name + b"/.wh..wh..opq"),
        "below": lambda: tar.file(name + b"/new/file", b"pwned"),
    }
    return actions[kind]()


KINDS = (
    "file", "directory", "symlink", "hard link", "link target", "fifo", "device", "whiteout",
    "opaque", "below",
)  # fmt: skip

NAMES = (
    b"../../../canary/victim",
    b"../../../canary/dir",
    b"./../../../canary/victim",
    b"a/../../../../canary/victim",
    b"a/b/../../../../../canary/dir",
    b"a/.//..//./../../../canary/victim",
    b"/../../../canary/victim",
    b"%(canary)s/victim",
    b"/%(canary)s/dir",
    b"//%(canary)s/dir/inner",
    b"..",
    b"../",
    b"/..",
    b"../..",
    b"a/..",
    b".",
    b"./",
    b"/",
    b"./.",
    b"...",
    b"..\x00/canary",
    b"..\\..\\..\\canary\\victim",
    b"lower-dir/../../../../canary/victim",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[2:-1] for name in NAMES])
def test_absolute_and_dotted_names(jail, name, kind):
    """Names that lead up or start at the host's root, for every type of member."""
    if kind == "opaque" and name in (b"/", b"/.."):
        # Were this ever wrong, it would empty the host. The name's cleaning is tested by itself.
        assert clean(name + b"/.wh..wh..opq") == (b".wh..wh..opq" if name == b"/" else None)
        return
    name = name.replace(b"%(canary)s", os.fsencode(jail.canary))
    result = jail.apply(member(Tar(), kind, name).end())
    if name.startswith(b".../") or not name.strip(b"/"):
        return
    if b".." in name.split(b"\0")[0].split(b"/"):
        climbs = os.path.normpath(name.split(b"\0")[0].lstrip(b"/")).startswith(b"..")
        assert isinstance(result, ArchiveError) or not climbs


PIVOTS = (
    b"../../../canary", b"%(canary)s", b"/", b"..", b"../../..", b".", b"pivot", b"lower-out",
    b"lower-abs", b"lower-up", b"/proc/self/root", b"/proc/self/cwd", b"/proc/self/fd/0",
    b"lower-dir/../../../../canary", b"x" * 4000,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", PIVOTS, ids=[ascii(name[:40])[2:-1] for name in PIVOTS])
def test_symlink_pivots(jail, target, kind):
    """A link made first, and then a member through it."""
    target = target.replace(b"%(canary)s", os.fsencode(jail.canary))
    for rest in (b"victim", b"dir", b"dir/inner", b"canary/victim", b"../canary/victim"):
        tar = Tar().symlink(b"pivot", target)
        jail.apply(member(tar, kind, b"pivot/" + rest).end())


LOWER = ("out", "abs", "victim", "up", "slash", "loop", "fifo", "device", "dir")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lower", LOWER)
def test_what_a_lower_layer_left(jail, lower, kind):
    """Members over and through links, devices and fifos of the layer below."""
    if lower == "device" and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    name = f"lower-{lower}".encode()
    if (lower, kind) == ("slash", "opaque"):
        name += b"/canary"  # were this ever wrong, it would not be the whole host that is emptied
    jail.apply(member(Tar(), kind, name).end())
    for rest in (b"/victim", b"/canary/victim", b"/jail/deep/x", b"/dir"):
        jail.apply(member(Tar(), kind, name + rest).end())


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_duplicates_of_every_two_types(jail, first, second):
    """One name twice, and then a third member below it."""
    tar = member(Tar(), first, b"twice")
    member(tar, second, b"twice")
    tar.file(b"after", b"x")
    result = jail.apply(tar.end())
    if not isinstance(result, ThinpoolError):
        assert (jail.root / "after").read_bytes() == b"x"
    tar = member(Tar().symlink(b"twice", b"../../../canary"), first, b"twice")
    jail.apply(member(tar, second, b"twice/victim").end())


def test_directory_swapped_for_a_link_under_its_files(jail):
    """The directory that earlier members opened is not where later ones go."""
    tar = Tar().dir(b"d", mtime=1).file(b"d/one", b"1")
    tar.symlink(b"d", b"../../../canary").file(b"d/victim", b"pwned").dir(b"d/dir", mode=0o000)
    assert isinstance(jail.apply(tar.end()), ArchiveError)  # no such directory inside the root
    assert (jail.root / "d").is_symlink()


def test_link_swapped_for_another_under_its_files(jail):
    """A path that led through one link leads through the next one later."""
    tar = Tar().dir(b"one").dir(b"two").symlink(b"l", b"one").symlink(b"m", b"l")
    tar.file(b"m/file", b"1").symlink(b"l", b"two").file(b"m/file", b"2")
    jail.apply(tar.end())
    assert (jail.root / "one/file").read_bytes() == b"1"
    assert (jail.root / "two/file").read_bytes() == b"2"


def test_times_of_a_directory_that_became_a_link(jail):
    """What is set at the end is not set through it."""
    tar = Tar().dir(b"d", mtime=1, mode=0o700).symlink(b"d", b"../../../canary/dir", mtime=2)
    jail.apply(tar.end())
    assert (jail.root / "d").lstat().st_mtime == 2


def test_hard_link_to_a_link_is_the_link(jail):
    """And writing over it replaces it."""
    tar = Tar().symlink(b"s", b"../../../canary/victim").link(b"h", b"s").file(b"h", b"mine")
    jail.apply(tar.end())
    assert (jail.root / "h").read_bytes() == b"mine"
    assert (jail.root / "s").is_symlink()


def test_hard_links_through_links_stay_inside(jail):
    """A target reached through a link of the archive or the layer below."""
    for target in (b"lower-out/victim", b"lower-abs/victim", b"lower-slash/etc/passwd",
                   b"lower-up/lower-dir/file", b"lower-victim"):  # fmt: skip
        jail.apply(Tar().link(b"h", target).file(b"h", b"pwned").end())


def test_hard_link_to_a_device_then_data(jail):
    """Nothing is written into a device: the name becomes a file."""
    if os.geteuid() != 0:
        pytest.skip("only root makes devices")
    tar = Tar().add(b"dev", kind=b"3", device=(1, 3)).link(b"h", b"dev").file(b"h", b"data")
    tar.file(b"lower-device", b"data").file(b"lower-fifo", b"data")
    jail.apply(tar.end())
    for name in ("h", "lower-device", "lower-fifo"):
        assert stat.S_ISREG((jail.root / name).lstat().st_mode)
    assert stat.S_ISCHR((jail.root / "dev").lstat().st_mode)


@pytest.mark.parametrize(
    "target", [b"", b"h", b"./h", b"missing", b"lower-dir", b"..", b"/", b"lower-dir/sub/../.."]
)
def test_hard_links_to_what_cannot_be(jail, target):
    """A clear error each."""
    assert isinstance(jail.apply(Tar().link(b"h", target).end()), ArchiveError)


WHITEOUTS = (
    b".wh.", b".wh..", b".wh...", b"lower-dir/.wh..", b"lower-dir/.wh...", b"lower-up/.wh.jail",
    b".wh.../canary", b".wh../x", b".wh./x", b"a/.wh.b/c", b"lower-out/.wh.victim",
    b"lower-out/.wh..wh..opq", b"lower-abs/.wh..wh..opq", b"lower-up/.wh..wh..opq",
    b"lower-victim/.wh..wh..opq", b"lower-loop/.wh.x", b"lower-loop/.wh..wh..opq", b".wh..wh.plnk",
    b".wh..wh.aufs", b"missing/.wh.x", b"missing/.wh..wh..opq", b"lower-fifo/.wh.x",
    b"lower-slash/.wh.canary", b".wh.lower-victim", b".wh.lower-out", b".wh.lower-fifo",
    b".wh." + b"x" * 255, b".wh..wh..opq/x", b".wh.\xff",
)  # fmt: skip


@pytest.mark.parametrize("name", WHITEOUTS, ids=[ascii(name[:30])[2:-1] for name in WHITEOUTS])
def test_whiteouts_that_climb(jail, name):
    """As a file, a directory and a link; only what is in the root goes."""
    for kind in (b"0", b"5", b"2"):
        result = jail.apply(Tar().add(name, kind=kind, linkname=b"../../../canary").end())
        base = name.rpartition(b"/")[2]
        if base in (b".wh.", b".wh..", b".wh..."):
            assert isinstance(result, ArchiveError)


# ---- lies ------------------------------------------------------------------------------------


def pax(records: dict[bytes, bytes] | bytes, **fields) -> bytes:
    fields.setdefault("data", b"content")
    return Tar().pax(records).file(b"file", **fields).end()


def sparse(tail_records: dict[bytes, bytes], data: bytes = b"x" * 512) -> bytes:
    return pax(tail_records, data=data)


def sparse1(lines: bytes, realsize: bytes = b"1000", data: bytes = b"x" * 100) -> bytes:
    records = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0",
               b"GNU.sparse.name": b"file", b"GNU.sparse.realsize": realsize}  # fmt: skip
    return pax(records, data=padded(lines) + data)


def old_sparse(pairs: list[tuple[int, int]], real: int, data: bytes, extended: int = 0) -> bytes:
    tail = bytes(41) + b"".join(base256(a, 12) + base256(b, 12) for a, b in pairs[:4])
    tail = tail.ljust(137, b"\0") + bytes([extended]) + base256(real, 12)
    return Tar().file(b"file", data, kind=b"S", magic=b"ustar  \0", tail=tail).end()


LIES: dict[str, bytes] = {
    "size beyond the end": Tar().raw(header(b"f", size=1 << 40)).end(),
    "size of 8 EiB": Tar().raw(header(b"f", size=(1 << 63) - 1)).end(),
    "size beyond 64 bits": Tar().raw(header(b"f", size=base256(1 << 80, 12))).end(),
    "negative size": Tar().raw(header(b"f", size=base256(-1, 12))).end(),
    "size of letters": Tar().raw(header(b"f", size=b"abcdefghijk")).end(),
    "size with a sign": Tar().raw(header(b"f", size=b"-0000000001")).end(),
    "size with an underscore": Tar().raw(header(b"f", size=b"1_0")).end(),
    "size in decimal": Tar().raw(header(b"f", size=b"0000000999")).end(),
    "mode of letters": Tar().raw(header(b"f", mode=b"rwxr-x")).end(),
    "owner of -1": Tar().file(b"f", uid=0xFFFF_FFFF).end(),
    "group of -1": Tar().file(b"f", gid=0xFFFF_FFFF).end(),
    "owner beyond 32 bits": Tar().file(b"f", uid=1 << 40).end(),
    "directory of owner -1": Tar().dir(b".", uid=0xFFFF_FFFF).end(),
    "negative owner": Tar().file(b"f", uid=base256(-1, 8)).end(),
    "device out of range": Tar().add(b"f", kind=b"4", device=(1 << 20, 1)).end(),
    "device minor out of range": Tar().add(b"f", kind=b"3", device=(1, 1 << 20)).end(),
    "checksum wrong": Tar().raw(header(b"f", checksum=b"0000000\0")).end(),
    "checksum of letters": Tar().raw(header(b"f", checksum=b"zzzzzzz\0")).end(),
    "checksum empty": Tar().raw(header(b"f", checksum=bytes(8))).end(),
    "type unknown": Tar().add(b"f", kind=b"Z").end(),
    "type multi-volume": Tar().add(b"f", kind=b"M").end(),
    "type directory dump": Tar().add(b"f", kind=b"D").end(),
    "link without target": Tar().symlink(b"f", b"").end(),
    "link target too long": Tar().symlink(b"f", b"x" * 5000).end(),
    "root as a file": Tar().file(b"./", b"x").end(),
    "root as a link": Tar().symlink(b".", b"/etc").end(),
    "root as a device": Tar().add(b"/", kind=b"3").end(),
    "name too long": Tar().file(b"n" * 256).end(),
    "directory name too long": Tar().file(b"n" * 256 + b"/f").end(),
    "path too long": Tar().file(b"/".join([b"n" * 200] * 30)).end(),
    "path too deep": Tar().file(b"/".join([b"n"] * 1500)).end(),
    "path of 100 KiB": Tar().file(b"x/" * 50_000).end(),
    "long name header of 1 GiB": Tar().raw(header(b"L", kind=b"L", size=1 << 30)).end(),
    "long name header of 2 MiB": Tar().long(b"L", b"x" * (2 << 20)).file(b"f").end(),
    "long link header of 2 MiB": Tar().long(b"K", b"x" * (2 << 20)).symlink(b"f", b"x").end(),
    "PAX header of 2 MiB": pax({b"comment": b"x" * (2 << 20)}),
    "PAX headers of 2 MiB together": Tar().pax({b"a": b"x" * 700_000}).pax(
        {b"b": b"x" * 700_000}).file(b"f").end(),
    "PAX header of 1 TiB": Tar().raw(header(b"x", kind=b"x", size=1 << 40)).end(),
    "PAX header at the end": Tar().pax({b"path": b"x"}).end(),
    "long name at the end": Tar().long(b"L", b"x").end(),
    "PAX record too long": pax(b"99 path=x\n"),
    "PAX record too short": pax(b"5 path=x\n"),
    "PAX record of length 0": pax(b"0 path=x\n"),
    "PAX record of huge length": pax(b"9" * 30 + b" path=x\n"),
    "PAX record of negative length": pax(b"-10 path=x\n"),
    "PAX record without length": pax(b"path=x\n"),
    "PAX record without key": pax(b"6 =xy\n"),
    "PAX record without equals": pax(b"8 pathx\n"),
    "PAX record without newline": pax(b"9 path=xy"),
    "PAX record of nothing": pax(b"3 \n"),
    "PAX path with NUL": pax({b"path": b"a\0b"}),
    "PAX path that climbs": pax({b"path": b"../../../canary/victim"}),
    "PAX link that climbs": Tar().pax({b"linkpath": b"../../../canary/victim"}).link(
        b"l", b"lower-dir/file").end(),
    "PAX size beyond the end": pax({b"size": b"99999999999"}),
    "PAX size of 20 digits": pax({b"size": b"9" * 20}),
    "PAX size negative": pax({b"size": b"-1"}),
    "PAX size of letters": pax({b"size": b"0x10"}),
    "PAX size empty": pax({b"size": b""}),
    "PAX size hides a header": pax({b"size": b"0"}, data=header(b"smuggled") + b"x" * BLOCK),
    "PAX uid beyond 32 bits": pax({b"uid": b"4294967296"}),
    "PAX uid of -1": pax({b"uid": b"4294967295"}),
    "PAX uid negative": pax({b"uid": b"-5"}),
    "PAX mtime not a number": pax({b"mtime": b"nan"}),
    "PAX mtime infinite": pax({b"mtime": b"inf"}),
    "PAX mtime with exponent": pax({b"mtime": b"1e400"}),
    "PAX mtime empty": pax({b"mtime": b""}),
    "PAX mtime of 100 digits": pax({b"mtime": b"1" * 100}),
    "PAX attribute without name": pax({b"SCHILY.xattr.": b"x"}),
    "PAX attribute without namespace": pax({b"SCHILY.xattr.nothing": b"x"}),
    "PAX attribute of NUL": pax({b"SCHILY.xattr.user.a\0b": b"x"}),
    "PAX attribute name too long": pax({b"SCHILY.xattr.user." + b"x" * 300: b"x"}),
    "PAX attribute too large": pax({b"SCHILY.xattr.user.x": b"x" * 100_000}),
    "PAX capability damaged": pax({b"SCHILY.xattr.security.capability": b"xyz"}),
    "PAX ACL damaged": pax({b"SCHILY.xattr.system.posix_acl_access": b"xyz"}),
    "global path": Tar().pax({b"path": b"evil"}, kind=b"g").file(b"f").end(),
    "global size": Tar().pax({b"size": b"1"}, kind=b"g").file(b"f").end(),
    "global attribute": Tar().pax({b"SCHILY.xattr.user.x": b"1"}, kind=b"g").file(b"f").end(),
    "global sparse": Tar().pax({b"GNU.sparse.major": b"1"}, kind=b"g").file(b"f").end(),
    "global owner of letters": Tar().pax({b"uid": b"root"}, kind=b"g").file(b"f").end(),
    "global headers of 2 MiB": Tar().raw(b"".join(
        Tar().pax({b"comment": b"x" * 500_000}, kind=b"g").file(b"f%d" % at).out.getvalue()
        for at in range(4))).end(),
    "sparse without size": sparse({b"GNU.sparse.map": b"0,512"}),
    "sparse of version 7": sparse({b"GNU.sparse.major": b"7", b"GNU.sparse.size": b"1"}),
    "sparse odd map": sparse({b"GNU.sparse.map": b"0,512,1", b"GNU.sparse.size": b"1000"}),
    "sparse map of letters": sparse({b"GNU.sparse.map": b"a,b", b"GNU.sparse.size": b"1000"}),
    "sparse beyond its size": sparse({b"GNU.sparse.map": b"600,512", b"GNU.sparse.size": b"700"}),
    "sparse map overlaps": sparse(
        {b"GNU.sparse.map": b"0,300,200,212", b"GNU.sparse.size": b"5000"}),
    "sparse map goes back": sparse(
        {b"GNU.sparse.map": b"600,300,0,212", b"GNU.sparse.size": b"5000"}),
    "sparse map of more than there is": sparse(
        {b"GNU.sparse.map": b"0,9999", b"GNU.sparse.size": b"99999"}),
    "sparse map of less than there is": sparse(
        {b"GNU.sparse.map": b"0,1", b"GNU.sparse.size": b"99999"}),
    "sparse map wraps": sparse(
        {b"GNU.sparse.map": b"%d,512" % ((1 << 63) - 1), b"GNU.sparse.size": b"99999"}),
    "sparse map of 300000": sparse(
        {b"GNU.sparse.map": b",".join([b"0,0"] * 100_000), b"GNU.sparse.size": b"1"}),
    "sparse name climbs": sparse({b"GNU.sparse.map": b"0,512", b"GNU.sparse.size": b"512",
                                  b"GNU.sparse.name": b"../../../canary/victim"}),
    "sparse name of NUL": sparse({b"GNU.sparse.map": b"0,512", b"GNU.sparse.size": b"512",
                                  b"GNU.sparse.name": b"a\0b"}),
    "sparse 0.0 odd": pax(record(b"GNU.sparse.size", b"999") +
                          record(b"GNU.sparse.offset", b"0"), data=b"x" * 512),
    "sparse 1.0 without map": sparse1(b"", data=b""),
    "sparse 1.0 huge count": sparse1(b"99999999\n"),
    "sparse 1.0 map of letters": sparse1(b"x\ny\n"),
    "sparse 1.0 line without end": sparse1(b"1" * 512),
    "sparse 1.0 map longer than the data": sparse1(b"5000\n" + b"0\n" * 200),
    "sparse 1.0 of more than there is": sparse1(b"1\n0\n999\n"),
    "sparse 1.0 negative": sparse1(b"1\n-5\n100\n"),
    "sparse 1.0 of 8 EiB": sparse1(b"1\n%d\n100\n" % ((1 << 63) - 101), b"%d" % ((1 << 63) - 1)),
    "old sparse overlaps": old_sparse([(0, 300), (100, 212)], 5000, b"x" * 512),
    "old sparse beyond its size": old_sparse([(600, 512)], 700, b"x" * 512),
    "old sparse of 8 EiB": old_sparse([((1 << 63) - 600, 512)], (1 << 63) - 1, b"x" * 512),
    "old sparse without its extension": old_sparse([(0, 512)], 512, b"", extended=1),
    "one block of zeros, then more": Tar().file(b"f").raw(bytes(BLOCK)).file(b"g").end(),
    "nothing": b"",
    "noise": bytes(range(256)) * 20,
    "text": b"#!/bin/sh\nrm -rf /\n" * 100,
}  # fmt: skip

HARMLESS = {
    "PAX size hides a header",  # read as PAX says: what follows is no header, or is one
    "size in decimal",
    "PAX record of nothing",
    "PAX attribute without namespace",  # noted
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_told_apart(jail, lie):
    """Each a clear error that names the member, and nothing outside touched."""
    result = jail.apply(LIES[lie])
    if lie not in HARMLESS:
        assert isinstance(result, ThinpoolError), lie
        assert result.kind in {"archive", "not_permitted"}, result


def test_lies_are_many() -> None:
    """The list stays as long as it was promised to be."""
    assert len(LIES) >= 100


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"5", b"6"])
def test_size_of_what_has_no_data_is_ignored(jail, kind):
    """As Docker does: the next header follows at once, whatever the size field says."""
    if kind == b"3" and os.geteuid() != 0:
        pytest.skip("only root makes devices")
    tar = Tar().raw(header(b"m", kind=kind, size=1 << 30, linkname=b"lower-dir/file"))
    result = jail.apply(tar.file(b"next", b"x").end())
    assert not isinstance(result, ThinpoolError)
    assert (jail.root / "next").read_bytes() == b"x"


# ---- bombs -----------------------------------------------------------------------------------


def gzip_of_zeros(name: bytes, size: int) -> Iterator[bytes]:
    """A gzip bomb made without its uncompressed form in memory."""
    packer = zlib.compressobj(9, wbits=31)
    yield packer.compress(header(name, size=size))
    zeros = bytes(1 << 20)
    for _ in range(size >> 20):
        piece = packer.compress(zeros)
        if piece:
            yield piece
    yield packer.compress(bytes(2 * BLOCK)) + packer.flush()


def zstd_of_zeros(name: bytes, size: int) -> Iterator[bytes]:
    """Blocks of one byte repeated, 4 bytes for 128 KiB each (RFC 8878)."""
    first = header(name, size=size)
    yield b"\x28\xb5\x2f\xfd" + b"\x00\x38"  # a window of 128 KiB
    yield (len(first) << 3).to_bytes(3, "little") + first
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    for _ in range(size >> 27):
        yield block * 1024
    yield (1024 << 3 | 1).to_bytes(3, "little") + bytes(1024)


def resident_kib() -> int:
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.parametrize("bomb", [gzip_of_zeros, zstd_of_zeros])
def test_bombs_meet_the_limit_in_constant_memory(jail, bomb):
    """A few KiB that ask for gigabytes."""
    before = resident_kib()
    fd = os.open(jail.root, os.O_RDONLY)
    try:
        source, _ = decompressed(IteratorSource(bomb(b"bomb", 4 << 30)), member="bomb")
        limits = Limits(stream_bytes=64 << 20)
        with pytest.raises(ArchiveError) as caught:
            Extractor(fd, limits=limits).apply(source)
        assert caught.value.limit == 64 << 20
    finally:
        os.close(fd)
    assert (jail.root / "bomb").stat().st_size <= 65 << 20
    assert resident_kib() - before < 32 << 10


def test_zstd_block_of_a_few_bytes_is_not_gigabytes_at_once():
    """Reading one piece makes at most a block, however many blocks the input holds."""
    source, _ = decompressed(IteratorSource(zstd_of_zeros(b"x", 4 << 30)), member="bomb")
    before = resident_kib()
    for _ in range(50):
        assert 0 < len(source.read(1 << 30)) <= 128 << 10
    assert resident_kib() - before < 16 << 10


def test_zstd_window_beyond_the_limit_is_refused():
    """A header that asks for 2 GiB of memory."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(31 - 10) << 3]) + b"\x01\x00\x00"
    source, _ = decompressed(IteratorSource(iter((frame,))), member="bomb")
    with pytest.raises(ArchiveError):
        source.read(1)


def test_sparse_bomb_takes_no_space(jail):
    """A file of 1 TiB that is all hole is what it says."""
    jail.apply(sparse1(b"1\n%d\n0\n" % (1 << 40), b"%d" % (1 << 40), data=b""))
    status = (jail.root / "file").stat()
    assert status.st_size == 1 << 40
    assert status.st_blocks == 0


def test_members_beyond_the_limit(jail):
    """Headers count too."""
    limits = Limits(tar=TarLimits(members=50))
    tar = Tar()
    for at in range(60):
        tar.file(b"f%d" % at)
    assert isinstance(jail.apply(tar.end(), limits=limits), ArchiveError)
    tar = Tar()
    for _ in range(60):
        tar.pax({b"comment": b"x"})
    assert isinstance(jail.apply(tar.file(b"f").end(), limits=limits), ArchiveError)


def test_endless_compression_of_nothing():
    """Empty gzip members without end are read in no memory and end with the input."""
    empty = zlib.compressobj(wbits=31).flush()
    source, kind = decompressed(IteratorSource(iter([empty * 1000] * 20)), member="x")
    assert kind == "gzip"
    assert source.read(10) == b""


# ---- cut short -------------------------------------------------------------------------------


def small() -> bytes:
    tar = Tar().dir(b"d/").file(b"d/" + b"n" * 120, b"content" * 100)
    tar.pax({b"mtime": b"1.5", b"SCHILY.xattr.user.x": b"1"}).file(b"d/pax", b"x" * 513)
    tar.symlink(b"s", b"d").link(b"h", b"d/pax")
    return tar.end()


def test_cut_at_every_byte(tmp_path):
    """A plain tar without its last byte, and so on down to nothing, is an error each time."""
    data = small()
    for size in range(len(data) - 1, -1, -7):
        root = tmp_path / str(size)
        root.mkdir()
        with pytest.raises(ArchiveError):
            extract(root, data[:size])


@pytest.mark.parametrize("how", ["gzip", "zstd", "zstd-unchecked"])
def test_cut_at_every_byte_of_a_compressed_tar(how):
    """Trailers and checksums included."""
    data = small()
    if how == "gzip":
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(data) + packer.flush()
    else:
        packed = zstandard.ZstdCompressor(write_checksum=how == "zstd").compress(data)
    for size in range(1, len(packed)):
        with pytest.raises(ArchiveError):  # noqa: PT012 - shorter than its magic it is a plain one
            source, kind = decompressed(IteratorSource(iter((packed[:size],))), member="x")
            assert kind != "plain" or size < 4
            while source.read(1 << 16):
                pass
            if kind == "plain":
                raise ArchiveError("no compression left to be cut", member="x")


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_every_flipped_byte_of_a_compressed_tar_is_noticed_or_changes_nothing(how):
    """With a checksum in the stream no wrong byte comes out of a read that ends well."""
    data = small()
    if how == "gzip":
        packer = zlib.compressobj(wbits=31)
        packed = packer.compress(data) + packer.flush()
    else:
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    noticed = 0
    for at in range(len(packed)):
        bent = packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :]
        out = bytearray()
        try:
            source, kind = decompressed(IteratorSource(iter((bent,))), member="x")
            while piece := source.read(1 << 16):
                out += piece
        except ArchiveError:
            noticed += 1
        else:
            assert kind == "plain" or bytes(out) == data
    assert noticed > len(packed) * 0.9


@pytest.mark.parametrize("seed", range(40))
def test_noise_in_headers_never_escapes(jail, seed):
    """Random bytes of a valid archive replaced, checksums mended: an error or a harmless result."""
    rng = random.Random(seed)
    data = bytearray(small())
    for _ in range(20):
        block = rng.randrange(len(data) // BLOCK) * BLOCK
        at = block + rng.choice([rng.randrange(100), rng.randrange(100, 157), rng.randrange(512)])
        data[at] = rng.choice([0, 0x2E, 0x2F, 0x31, 0x35, 0x80, 0xFF, rng.randrange(256)])
        field = bytes(data[block : block + 148]) + b" " * 8 + bytes(data[block + 156 : block + 512])
        data[block + 148 : block + 156] = b"%06o\0 " % sum(field)
    jail.apply(bytes(data), need_end=False)


def test_pairs_of_kinds_cover_every_member_type() -> None:
    """The matrix above leaves none out."""
    kinds = set()
    for kind in KINDS:
        data = member(Tar(), kind, b"x").end()
        for at in range(0, len(data) - 2 * BLOCK, BLOCK):
            kinds.add(data[at + 156 : at + 157])
    assert kinds >= {b"0", b"1", b"2", b"3", b"5", b"6"}
    assert len(list(itertools.product(KINDS, NAMES))) >= 100
