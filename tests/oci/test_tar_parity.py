"""Random archives by Python's tarfile, in its three formats, read the same by our parser."""

from __future__ import annotations

import contextlib
import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from thinpool.errors import ArchiveError
from thinpool.oci.streams import IteratorSource
from thinpool.oci.tar import TarReader

NAMES = st.binary(min_size=1, max_size=300).map(
    lambda raw: raw.replace(b"\0", b"a").replace(b"\n", b"n").rstrip(b"/") or b"x"
)
KINDS = st.sampled_from([
    tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
    tarfile.BLKTYPE, tarfile.FIFOTYPE,
])  # fmt: skip
MEMBERS = st.lists(
    st.tuples(
        NAMES, KINDS, st.binary(max_size=2000), st.integers(0, 0o7777),
        st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 2**33 - 1), NAMES,
        st.integers(0, 4095), st.integers(0, 2**18),
    ),
    max_size=8,
)  # fmt: skip
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def read(data: bytes) -> list[tuple]:
    reader = TarReader(IteratorSource(iter((data,))))
    found = []
    for member in reader:
        body = bytearray()
        reader.data(body.extend)
        found.append((member, bytes(body)))
    return found


@given(MEMBERS, FORMATS)
def test_what_tarfile_writes_is_read_as_it_was_meant(members, form):
    """Names of any bytes, large numbers, every type."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, kind, data, mode, uid, gid, mtime, link, major, minor in members:
            info = tarfile.TarInfo(text(name))
            info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, uid, gid, mtime
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = text(link)
            if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
                info.devmajor, info.devminor = major, minor
            if kind == tarfile.REGTYPE:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                archive.addfile(info)
    found = read(out.getvalue())
    assert len(found) == len(members)
    for (member, body), wanted in zip(found, members, strict=True):
        name, kind, data, mode, uid, gid, mtime, link, major, minor = wanted
        assert member.name.rstrip(b"/") == name.rstrip(b"/")
        assert (member.kind, member.mode, member.uid, member.gid) == (kind, mode, uid, gid)
        assert member.mtime_ns == mtime * 1_000_000_000
        assert body == (data if kind == tarfile.REGTYPE else b"")
        if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            assert member.linkname == link
        if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            assert member.device == (major, minor)


@given(st.binary(max_size=4096), st.integers(0, 3))
def test_any_bytes_are_read_or_refused(noise, prefix):
    """Never another exception, whatever follows a valid start."""
    start = [b"", bytes(512), bytes(1024), b"\0" * 257 + b"ustar\00000"][prefix]
    refused: ArchiveError | None = None
    try:
        read(start + noise)
    except ArchiveError as error:
        refused = error
    assert refused is None or refused.member is not None


@given(MEMBERS, st.data())
def test_one_changed_byte_is_read_or_refused(members, data):
    """A header's sum catches its own changes; the rest is data."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, _, body, *_ in members:
            info = tarfile.TarInfo(text(name))
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    raw = bytearray(out.getvalue())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ArchiveError):
        assert len(read(bytes(raw))) <= len(members)
