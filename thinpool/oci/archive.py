"""Images as they come: a tar, a directory, a ``docker save`` archive, an OCI layout.

:func:`open_source` finds out by content which it is and gives an :class:`ImageSource`: the image's
config and its layers, lowest first, each of which can be opened as an uncompressed tar whose
digests are compared as it is read. What an archive promises, it has to keep: sizes and digests of
blobs, digests of uncompressed layers (diffIDs) and of the config. Nothing is unpacked to disk,
but an image archive that cannot be read twice (from a pipe, or compressed as a whole) is first
copied to an unnamed temporary file.

Sources: OCI image spec v1.1 (image-layout.md, image-index.md, manifest.md, config.md, layer.md),
Docker image spec v1.2 ("Combined Image JSON + Filesystem Changeset Format").

Not thread-safe.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform as host_platform
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, Self, TypeAlias

from thinpool.errors import (
    ArchiveError,
    HostSpaceError,
    NotFoundError,
    NotPermittedError,
    StorageIOError,
    UsageError,
)
from thinpool.oci import export, syscalls
from thinpool.oci.extract import clean
from thinpool.oci.streams import (
    CHUNK,
    CountingSource,
    FileSource,
    HashingSource,
    IteratorSource,
    PeekSource,
    RangeSource,
    Source,
    check_digest,
    decompressed,
)
from thinpool.oci.tar import BLOCK, HARD_LINK, REGULAR, SYMLINK, TarReader, text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

Json: TypeAlias = Any  # what json.loads gives; every field is checked where it is read

_JSON_MAX: Final = 8 << 20  # of a manifest, an index or a config; registries stop at 4 MiB
_INDEXED_MAX: Final = 100_000  # entries an image archive may have; beyond that it is a plain tar
_LAYERS_MAX: Final = 4096
_INDEX_DEPTH_MAX: Final = 8
_LINKS_MAX: Final = 16
_SNIFF: Final = 64 * 1024

_INDEX_TYPES: Final = frozenset(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_MANIFEST_TYPES: Final = frozenset(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_CONFIG_TYPES: Final = frozenset(
    (
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    )
)
_LAYER_TYPE: Final = re.compile(
    r"application/vnd\.oci\.image\.layer\.(?:nondistributable\.)?v1\.tar(?:\+(?:gzip|zstd))?"
    r"|application/vnd\.docker\.image\.rootfs\.(?:foreign\.)?diff\.tar(?:\.gzip|\.zstd)?"
)
_REF_ANNOTATIONS: Final = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
_ATTESTATION: Final = "vnd.docker.reference.type"
# How the first entry of an image archive is named by docker, skopeo, podman, buildah, crane, bazel.
_IMAGE_ENTRY: Final = re.compile(
    rb"blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|(sha256:)?[0-9a-f]{64}([./].*)?",
    re.DOTALL,
)
# How layers and configs are named in them; nothing of a root filesystem is, at these places.
_LAYER_ENTRY: Final = re.compile(
    rb"blobs/.*|[^/]+/layer\.tar|[^/]+\.tar(\.gz|\.zst)?|(sha256:)?[0-9a-f]{64}([./].*)?",
    re.DOTALL,
)
_CONFIG_NAME: Final = re.compile(r"(?:sha256:)?([0-9a-f]{64})(?:\.json)?")
_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "armv7l": "arm",
    "armv6l": "arm",
    "loongarch64": "loong64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """``os/architecture[/variant]``, in Go's names."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, given: str) -> Platform:
        """Read what a user or a config gives.

        Raises:
            UsageError: not two or three parts.
        """
        parts = given.lower().split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise UsageError(
                f"{given!r} is not a platform: it is os/architecture[/variant], as linux/arm64",
                platform=given,
            )
        architecture = _ARCHITECTURES.get(parts[1], parts[1])
        variant = parts[2] if len(parts) > 2 else ""  # noqa: PLR2004 (the third)
        return cls(os=parts[0], architecture=architecture, variant=variant)

    @classmethod
    def host(cls) -> Platform:
        """This machine's."""
        machine = host_platform.machine().lower()
        return cls(os="linux", architecture=_ARCHITECTURES.get(machine, machine))

    def matches(self, wanted: Platform) -> bool:
        """Whether an image for this platform is what was asked for; no variant asks for any."""
        return (self.os, self.architecture) == (wanted.os, wanted.architecture) and (
            not wanted.variant or self._variant() == wanted._variant()
        )

    def _variant(self) -> str:
        # What leaving it out means (containerd's platforms package, "Normalization").
        default = {"arm64": "v8", "arm": "v7", "amd64": "v1"}.get(self.architecture, "")
        return self.variant or default

    def __str__(self) -> str:
        """As it is given."""
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def chain_id(parent: str | None, diff_id: str) -> str:
    """The chainID of a layer on a stack (OCI image spec, config.md, "Layer ChainID")."""
    if parent is None:
        return diff_id
    return "sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLayer:
    """One layer of an image.

    Attributes:
        name: where it is in the archive, for people.
        diff_id: promised digest of the uncompressed tar; None where nothing promises one.
        size: bytes as stored; None where that is not known before they are read.
        whiteouts: whether names in ``.wh.`` hide; not so for a plain directory's files.
        need_end: whether the tar's end mark must be there, for want of a digest.
    """

    name: str
    diff_id: str | None
    size: int | None
    whiteouts: bool = True
    need_end: bool = False


class LayerStream:
    """An open layer: a :class:`~thinpool.oci.streams.Source` of its uncompressed tar.

    Reading to the end compares size and digests; only then is :attr:`diff_id` the layer's.
    """

    def __init__(self, source: HashingSource, close: Callable[[], object] | None = None) -> None:
        """Own what ``close`` closes."""
        self._source = source
        self._close = close

    def read(self, size: int, /) -> bytes:
        """As :class:`~thinpool.oci.streams.Source`."""
        return self._source.read(size)

    @property
    def diff_id(self) -> str:
        """The digest of what was read so far."""
        return self._source.digest

    def close(self) -> None:
        """Close what lies below; may be repeated."""
        close, self._close = self._close, None
        if close is not None:
            close()

    def __enter__(self) -> Self:
        """Close at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Descriptor:
    """What an index or a manifest says of a blob."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str]
    platform: Platform | None
    urls: bool

    @property
    def blob(self) -> bytes:
        return b"blobs/" + self.digest.replace(":", "/").encode()


class _Files(Protocol):
    """The files of an image archive by cleaned name."""

    def names(self) -> Iterable[bytes]:
        """Names to judge by what this is; of a directory those at its top."""
        ...

    def has(self, name: bytes) -> bool:
        """Whether there is such an entry."""
        ...

    def open(self, name: bytes) -> tuple[Source, int, Callable[[], object] | None]:
        """A file's bytes, their number, and what closes it."""
        ...


class ImageSource:
    """One image of a source that was opened; a context manager."""

    def __init__(
        self,
        *,
        kind: str,
        layers: tuple[SourceLayer, ...],
        opener: Callable[[int, Callable[[int], None] | None], LayerStream],
        config: dict[str, Json] | None = None,
        config_digest: str | None = None,
        refs: tuple[str, ...] = (),
        platform: Platform | None = None,
        resources: contextlib.ExitStack,
    ) -> None:
        """What :func:`open_source` found."""
        self.kind = kind
        self.layers = layers
        self.config = config
        self.config_digest = config_digest
        self.refs = refs
        self.platform = platform
        self._opener = opener
        self._resources = resources

    def open_layer(
        self, index: int, *, progress: Callable[[int], None] | None = None
    ) -> LayerStream:
        """Open a layer; of a plain tar or directory only once.

        Args:
            index: 0 is the lowest.
            progress: told the size of each piece as stored.
        """
        return self._opener(index, progress)

    def close(self) -> None:
        """Close the archive; may be repeated."""
        self._resources.close()

    def __enter__(self) -> Self:
        """Close at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def open_source(
    source: Path | str | int,
    *,
    ref: str | None = None,
    platform: str | None = None,
    spool_directory: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> ImageSource:
    """Find out what ``source`` is and read all of it but the layers.

    Args:
        source: a path, ``-`` for standard input, or a descriptor, which stays the caller's.
        ref: which image of several: a name, a name with a tag, or a tag alone.
        platform: likewise, ``linux/arm64`` and the like; this host's where there is a choice.
        spool_directory: where an image archive from a pipe is kept; the system's for temporary
            files if None.
        note: told what is left out of a directory, a line each.

    Raises:
        NotFoundError: no such file; no image of this name or for this platform.
        UsageError: several images, and nothing says which.
        ArchiveError: it is damaged, lies, or is nothing that can be imported.
        HostSpaceError: no space for the temporary file.
    """
    wanted = Platform.parse(platform) if platform is not None else None
    with contextlib.ExitStack() as stack:
        fd = _open(source, stack)
        mode = os.fstat(fd).st_mode
        opened = _Opened(
            fd=fd,
            name="standard input" if source == "-" else str(source),
            ref=ref,
            platform=wanted,
            spool_directory=spool_directory,
            note=note,
            stack=stack,
        )
        image = opened.directory() if stat.S_ISDIR(mode) else opened.file(mode)
        stack.pop_all()
    return image


def _open(source: Path | str | int, stack: contextlib.ExitStack) -> int:
    if isinstance(source, int):
        return source
    if source == "-":
        return 0
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no {source}", path=str(source)) from error
    except PermissionError as error:
        raise NotPermittedError(
            f"{source} cannot be read: {error.strerror}", operation="read", path=str(source)
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(source)!r} cannot be opened: {error}", path=str(source)) from error
    stack.callback(os.close, fd)
    return fd


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A source's descriptor, with what was asked of it."""

    fd: int
    name: str
    ref: str | None
    platform: Platform | None
    spool_directory: Path | None
    note: Callable[[str], None] | None
    stack: contextlib.ExitStack

    # ---- directories -----------------------------------------------------------------------

    def directory(self) -> ImageSource:
        files = _DirectoryFiles(self.fd, self.name)
        image = self._image(files)
        if image is not None:
            return image
        self._choose_nothing()

        def opener(_index: int, progress: Callable[[int], None] | None) -> LayerStream:
            pieces = export.iter_tar(self.fd, note=self.note, progress=progress)
            return LayerStream(
                HashingSource(IteratorSource(pieces), member=self.name),
                getattr(pieces, "close", None),
            )

        layer = SourceLayer(name=self.name, diff_id=None, size=None, whiteouts=False, need_end=True)
        return ImageSource(
            kind="directory", layers=(layer,), opener=opener, resources=self._resources()
        )

    def _resources(self) -> contextlib.ExitStack:
        return self.stack.pop_all()

    def _choose_nothing(self) -> None:
        if self.ref is not None or self.platform is not None:
            option = "--ref" if self.ref is not None else "--platform"
            raise UsageError(
                f"{self.name} is no image archive: {option} has nothing to choose from",
                source=self.name,
            )

    # ---- files and pipes -------------------------------------------------------------------

    def file(self, mode: int) -> ImageSource:
        seekable = stat.S_ISREG(mode)
        try:
            if seekable:
                start = os.lseek(self.fd, 0, os.SEEK_CUR)
                size = os.fstat(self.fd).st_size - start
                head = os.pread(self.fd, BLOCK, start)
                if _is_tar(head):
                    return self._seekable_tar(self.fd, start, size)
                return self._stream(size)
            return self._stream(None)
        except OSError as error:
            raise StorageIOError(
                f"cannot read {self.name}: {error.strerror}", errno=error.errno, path=self.name
            ) from error

    def _seekable_tar(self, fd: int, start: int, size: int) -> ImageSource:
        index = _TarFiles.read(fd, start=start, size=size, name=self.name)
        if index is not None:
            image = self._image(index)
            if image is not None:
                return image
        source = RangeSource(fd, offset=start, size=size, member=self.name)
        return self._plain(source, size)

    def _stream(self, size: int | None) -> ImageSource:
        """A pipe, or a file compressed as a whole: to be read once."""
        counting = _Telling(FileSource(self.fd))
        plain, _ = decompressed(counting, member=self.name)
        peek = PeekSource(plain)
        head = peek.peek(_SNIFF)
        if not head:
            raise ArchiveError(f"{self.name}: is empty", member=self.name)
        if not _is_tar(head):
            raise ArchiveError(
                f"{self.name}: is neither a tar, plain or compressed with gzip or zstd, nor an"
                " image archive",
                member=self.name,
            )
        first = _first_name(head)
        if first is not None and _IMAGE_ENTRY.fullmatch(first):
            spooled, length = self._spool(peek)
            return self._seekable_tar(spooled, 0, length)
        return self._plain(peek, size, counting)

    def _spool(self, source: Source) -> tuple[int, int]:
        where = self.spool_directory or Path(tempfile.gettempdir())
        try:
            file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115 (the stack closes it)
            self.stack.callback(file.close)
            while data := source.read(CHUNK):
                file.write(data)
            file.flush()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HostSpaceError(
                    f"{self.name}: no space in {where} to keep it while it is imported",
                    path=str(where),
                ) from error
            raise
        return file.fileno(), file.tell()

    def _plain(
        self,
        source: Source,
        size: int | None,
        counting: _Telling | None = None,
    ) -> ImageSource:
        self._choose_nothing()
        layer = SourceLayer(name=self.name, diff_id=None, size=size, need_end=True)
        used = False

        def opener(_index: int, progress: Callable[[int], None] | None) -> LayerStream:
            nonlocal used
            if used:
                raise UsageError(f"{self.name}: can be read only once", source=self.name)
            used = True
            inner = source
            if progress is not None:
                if counting is not None:
                    counting.tell(progress)
                else:
                    inner = CountingSource(source, progress)
            return LayerStream(HashingSource(inner, member=self.name))

        return ImageSource(kind="tar", layers=(layer,), opener=opener, resources=self._resources())

    # ---- image archives --------------------------------------------------------------------

    def _image(self, files: _Files) -> ImageSource | None:
        """The image that these files hold; None where they are no image archive."""
        archive = _ImageArchive(files, name=self.name, ref=self.ref, platform=self.platform)
        found = archive.find()
        if found is None:
            return None
        return ImageSource(
            kind=found.kind,
            layers=tuple(layer.layer for layer in found.layers),
            opener=lambda index, progress: archive.open_layer(found.layers[index], progress),
            config=found.config,
            config_digest=found.config_digest,
            refs=found.refs,
            platform=found.platform,
            resources=self._resources(),
        )


class _Telling:
    """A source that can be told late whom to tell what passes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._passed = 0
        self._progress: Callable[[int], None] | None = None

    def tell(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        progress(self._passed)

    def read(self, size: int, /) -> bytes:
        data = self._source.read(size)
        self._passed += len(data)
        if self._progress is not None:
            self._progress(len(data))
        return data


def _is_tar(head: bytes) -> bool:
    """Whether this begins with a tar header, or is an empty tar."""
    if len(head) < BLOCK:
        return head[257:262] == b"ustar"  # cut short: a tar all the same
    block = head[:BLOCK]
    if not block.strip(b"\0"):
        return True
    digits = block[148:156].strip(b" \0")
    total = sum(block) - sum(block[148:156]) + 8 * 0x20
    signed = total - 0x100 * sum(byte >> 7 for byte in block[:148] + block[156:])
    return digits.lstrip(b"0") in (b"%o" % total, b"%o" % max(signed, 0))


def _first_name(head: bytes) -> bytes | None:
    """The cleaned name of the first entry that has one."""
    with contextlib.suppress(ArchiveError):
        for member in TarReader(IteratorSource(iter((head,))), need_end=False):
            name = clean(member.name)
            if name:
                return name
    return None


# ---- the files of an archive ----------------------------------------------------------------


def _missing(name: bytes, archive: str) -> ArchiveError:
    return ArchiveError(f"{archive}: {text(name)} is missing in it", member=text(name))


def _escapes(name: bytes, archive: str) -> ArchiveError:
    return ArchiveError(
        f"{archive}: {text(name)} is a link that leads out of the archive", member=text(name)
    )


class _TarFiles:
    """The files of a tar that can be read at any place."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._files: dict[bytes, tuple[int, int]] = {}
        self._links: dict[bytes, bytes | None] = {}  # None: leads out

    @classmethod
    def read(cls, fd: int, *, start: int, size: int, name: str) -> _TarFiles | None:
        """Read all headers; None for a tar of more entries than an image archive has."""
        files = cls(fd, name)
        source = RangeSource(fd, offset=start, size=size, member=name)
        reader = TarReader(source, archive=name)
        for member in reader:
            if reader.count > _INDEXED_MAX:
                return None
            entry = clean(member.name)
            if not entry:
                continue
            files._files.pop(entry, None)
            files._links.pop(entry, None)
            if member.kind == REGULAR and member.sparse is None:
                files._files[entry] = (start + reader.position, member.size)
            elif member.kind == HARD_LINK:
                files._links[entry] = clean(member.linkname)
            elif member.kind == SYMLINK:
                upper = entry.rpartition(b"/")[0]
                absolute = member.linkname.startswith(b"/")
                files._links[entry] = None if absolute else clean(upper + b"/" + member.linkname)
        return files

    def names(self) -> Iterable[bytes]:
        return [*self._files, *self._links]

    def has(self, name: bytes) -> bool:
        return name in self._files or name in self._links

    def open(self, name: bytes) -> tuple[Source, int, Callable[[], object] | None]:
        at = name
        for _ in range(_LINKS_MAX):
            if at in self._files:
                offset, size = self._files[at]
                source = RangeSource(self._fd, offset=offset, size=size, member=text(name))
                return source, size, None
            if at not in self._links:
                raise _missing(name, self._name)
            target = self._links[at]
            if target is None:
                raise _escapes(name, self._name)
            at = target
        raise ArchiveError(f"{self._name}: {text(name)} is a loop of links", member=text(name))


class _DirectoryFiles:
    """The files of an image archive that was unpacked into a directory."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    def names(self) -> Iterable[bytes]:
        return [os.fsencode(name) for name in os.listdir(self._fd)]  # noqa: PTH208 (a descriptor)

    def has(self, name: bytes) -> bool:
        with contextlib.suppress(OSError):
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
            return True
        return False

    def open(self, name: bytes) -> tuple[Source, int, Callable[[], object] | None]:
        resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS
        try:
            # O_NONBLOCK: a fifo would be waited for.
            fd = syscalls.openat2(self._fd, name, os.O_RDONLY | os.O_NONBLOCK, resolve=resolve)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _missing(name, self._name) from error
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise _escapes(name, self._name) from error
            raise ArchiveError(
                f"{self._name}: {text(name)} cannot be read: {error.strerror}", member=text(name)
            ) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ArchiveError(f"{self._name}: {text(name)} is no file", member=text(name))
        source = RangeSource(fd, offset=0, size=status.st_size, member=text(name))
        return source, status.st_size, lambda: os.close(fd)


# ---- what the files say ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _FoundLayer:
    """A layer and how it is verified."""

    layer: SourceLayer
    file: bytes
    digest: str | None  # of the stored bytes
    size: int | None  # promised


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The image that was chosen."""

    kind: str
    layers: tuple[_FoundLayer, ...]
    config: dict[str, Json]
    config_digest: str
    refs: tuple[str, ...]
    platform: Platform | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """An image that an index or a manifest.json offers."""

    descriptor: _Descriptor
    refs: tuple[str, ...]
    platform: Platform | None


class _ImageArchive:
    """Reads the JSON of an image archive; trusts none of it."""

    def __init__(
        self, files: _Files, *, name: str, ref: str | None, platform: Platform | None
    ) -> None:
        self._files = files
        self._name = name
        self._ref = ref
        self._platform = platform

    def find(self) -> _Found | None:
        """The image chosen; None where this is no image archive."""
        has = self._files.has
        tops = {name.partition(b"/")[0] for name in self._files.names()}
        if has(b"index.json") and (has(b"oci-layout") or b"blobs" in tops):
            return self._oci()
        if has(b"manifest.json"):
            try:
                manifest = self._json(b"manifest.json")
                shaped = isinstance(manifest, list) and any(
                    isinstance(entry, dict) and "Layers" in entry for entry in manifest
                )
            except ArchiveError:
                if not self._looks_like_an_image():
                    return None
                raise
            if shaped or self._looks_like_an_image():
                return self._docker(manifest)
        elif tops and all(_IMAGE_ENTRY.fullmatch(name) for name in tops):
            raise ArchiveError(
                f"{self._name}: an image archive with neither index.json nor manifest.json (what"
                " Docker before 1.10 wrote is not supported)",
                member="manifest.json",
            )
        return None

    def _looks_like_an_image(self) -> bool:
        return any(_LAYER_ENTRY.fullmatch(name) for name in self._files.names())

    def open_layer(self, found: _FoundLayer, progress: Callable[[int], None] | None) -> LayerStream:
        """The layer's uncompressed bytes, verified on the way."""
        stored, size, close = self._files.open(found.file)
        member = found.layer.name
        try:
            if found.size is not None and size != found.size:
                self._bad(member, f"has {size} bytes, not {found.size}")
            if progress is not None:
                stored = CountingSource(stored, progress)
            # A plain layer's blob is its own uncompressed form: one digest says it all.
            if found.digest is not None and found.digest != found.layer.diff_id:
                stored = HashingSource(stored, member=member, digest=found.digest)
            plain, _ = decompressed(stored, member=member)
            source = HashingSource(plain, member=member, digest=found.layer.diff_id)
        except BaseException:
            if close is not None:
                close()
            raise
        return LayerStream(source, close)

    # ---- JSON ------------------------------------------------------------------------------

    def _bad(self, member: str, what: str) -> NoReturn:
        raise ArchiveError(f"{self._name}: {member}: {what}", member=member)

    def _bytes(self, name: bytes) -> bytes:
        source, size, close = self._files.open(name)
        try:
            if size > _JSON_MAX:
                self._bad(text(name), f"is {size} bytes long; {_JSON_MAX} are allowed")
            data = bytearray()
            while piece := source.read(CHUNK):
                data += piece
            return bytes(data)
        finally:
            if close is not None:
                close()

    def _json(self, name: bytes) -> Json:
        return self._parsed(self._bytes(name), text(name))

    def _parsed(self, data: bytes, member: str) -> Json:
        try:
            value = json.loads(data)
            # A lone surrogate is no text: it could neither be a name here nor be printed.
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            self._bad(member, f"is not JSON ({type(error).__name__}: {str(error)[:100]})")
        return value

    def _blob_json(self, descriptor: _Descriptor) -> dict[str, Json]:
        member = text(descriptor.blob)
        data = self._bytes(descriptor.blob)
        if len(data) != descriptor.size:
            self._bad(member, f"has {len(data)} bytes, not {descriptor.size}")
        algorithm, _, wanted = descriptor.digest.partition(":")
        found = hashlib.new(algorithm, data).hexdigest()
        if found != wanted:
            raise ArchiveError(
                f"{self._name}: {member}: its digest is {algorithm}:{found}",
                member=member,
                found=f"{algorithm}:{found}",
                wanted=descriptor.digest,
            )
        return self._object(self._parsed(data, member), member)

    def _object(self, value: Json, member: str) -> dict[str, Json]:
        if not isinstance(value, dict):
            self._bad(member, "is not a JSON object where it has to be one")
        return value

    def _list(self, value: Json, key: str, member: str) -> list[Json]:
        found = value.get(key)
        if not isinstance(found, list):
            self._bad(member, f"has no list {key!r}")
        return found

    def _string(self, value: dict[str, Json], key: str, member: str) -> str:
        found = value.get(key, "")
        if not isinstance(found, str):
            self._bad(member, f"{key!r} is not a string")
        return found

    def _descriptor(self, value: Json, member: str) -> _Descriptor:
        entry = self._object(value, member)
        size = entry.get("size")
        if type(size) is not int or size < 0:
            self._bad(member, "a descriptor without a size")
        annotations = self._object(entry.get("annotations") or {}, member)
        given = entry.get("platform")
        return _Descriptor(
            media_type=self._string(entry, "mediaType", member),
            digest=check_digest(entry.get("digest"), member=member),
            size=size,
            annotations={
                key: value for key, value in annotations.items() if isinstance(value, str)
            },
            platform=self._platform_of(given, member) if given else None,
            urls=bool(entry.get("urls")),
        )

    def _platform_of(self, value: Json, member: str) -> Platform | None:
        entry = self._object(value, member)
        system, architecture = (self._string(entry, key, member) for key in ("os", "architecture"))
        if not system or not architecture:
            return None
        return Platform(
            os=system.lower(),
            architecture=_ARCHITECTURES.get(architecture.lower(), architecture.lower()),
            variant=self._string(entry, "variant", member).lower(),
        )

    # ---- choosing --------------------------------------------------------------------------

    def _choose(self, candidates: list[_Candidate]) -> _Candidate:
        if not candidates:
            self._bad("index.json", "holds no image")
        if self._ref is not None:
            named = [one for one in candidates if _names(one.refs, self._ref)]
            if not named:
                raise NotFoundError(
                    f"{self._name} holds no image {self._ref}; it has"
                    f" {_listed(ref for one in candidates for ref in one.refs)}",
                    ref=self._ref,
                )
            candidates = named
        candidates = list({one.descriptor.digest: one for one in candidates}.values())
        if self._platform is not None:
            wanted = self._platform
            candidates = self._on_platform(candidates, wanted)
        elif len(candidates) > 1:
            host = Platform.host()
            candidates = [
                one for one in candidates if one.platform is None or one.platform.matches(host)
            ] or candidates
        if len(candidates) > 1:
            raise UsageError(
                f"{self._name} holds several images, choose one with --ref or --platform:"
                f" {_listed(_label(one) for one in candidates)}",
                source=self._name,
            )
        return candidates[0]

    def _on_platform(self, candidates: list[_Candidate], wanted: Platform) -> list[_Candidate]:
        found = [one for one in candidates if one.platform and one.platform.matches(wanted)]
        if not found:
            raise NotFoundError(
                f"{self._name} holds no image for {wanted}; it has"
                f" {_listed(str(one.platform or 'unknown') for one in candidates)}",
                platform=str(wanted),
            )
        exact = [one for one in found if one.platform and one.platform.variant == wanted.variant]
        return exact if len(found) > 1 and exact else found

    # ---- OCI layout ------------------------------------------------------------------------

    def _oci(self) -> _Found:
        if self._files.has(b"oci-layout"):
            layout = self._object(self._json(b"oci-layout"), "oci-layout")
            version = self._string(layout, "imageLayoutVersion", "oci-layout")
            if not version.startswith("1."):
                self._bad("oci-layout", f"version {version!r:.50} is not supported")
        index = self._object(self._json(b"index.json"), "index.json")
        candidates: list[_Candidate] = []
        self._collect(index, "index.json", (), candidates, depth=0)
        chosen = self._choose(candidates)
        manifest = self._blob_json(chosen.descriptor)
        return self._manifest(manifest, text(chosen.descriptor.blob), chosen)

    def _collect(
        self,
        index: dict[str, Json],
        member: str,
        refs: tuple[str, ...],
        candidates: list[_Candidate],
        *,
        depth: int,
    ) -> None:
        """Add the images of an index and of the indexes in it."""
        if depth > _INDEX_DEPTH_MAX:
            self._bad(member, "indexes are nested too deeply")
        for value in self._list(index, "manifests", member):
            entry = self._descriptor(value, member)
            if _ATTESTATION in entry.annotations:
                continue
            own = tuple(
                entry.annotations[key] for key in _REF_ANNOTATIONS if key in entry.annotations
            )
            names = (*refs, *own)
            if entry.media_type in _INDEX_TYPES:
                inner = self._blob_json(entry)
                self._collect(inner, text(entry.blob), names, candidates, depth=depth + 1)
            elif entry.media_type in _MANIFEST_TYPES:
                if len(candidates) >= _LAYERS_MAX:
                    self._bad(member, "too many images")
                platform = entry.platform or self._config_platform(entry)
                candidates.append(_Candidate(descriptor=entry, refs=names, platform=platform))
            else:
                self._bad(member, f"the media type {entry.media_type!r:.100} is not supported")

    def _config_platform(self, descriptor: _Descriptor) -> Platform | None:
        """What an image's config says, for an index that does not say it."""
        if not self._files.has(descriptor.blob):
            return None  # a layout may hold a part of an index's images
        manifest = self._blob_json(descriptor)
        config = self._descriptor(manifest.get("config"), text(descriptor.blob))
        if config.media_type not in _CONFIG_TYPES or not self._files.has(config.blob):
            return None
        return self._platform_of(self._blob_json(config), text(config.blob))

    def _manifest(self, manifest: dict[str, Json], member: str, chosen: _Candidate) -> _Found:
        config_descriptor = self._descriptor(manifest.get("config"), member)
        if config_descriptor.media_type not in _CONFIG_TYPES:
            self._bad(
                member,
                f"is no image: its config is of the type {config_descriptor.media_type!r:.100}",
            )
        config = self._blob_json(config_descriptor)
        values = self._list(manifest, "layers", member)
        diff_ids = self._diff_ids(config, text(config_descriptor.blob), len(values))
        layers = tuple(
            self._oci_layer(self._descriptor(value, member), diff_id)
            for value, diff_id in zip(values, diff_ids, strict=True)
        )
        return _Found(
            kind="oci-layout",
            layers=layers,
            config=config,
            config_digest=config_descriptor.digest,
            refs=chosen.refs,
            platform=self._platform_of(config, text(config_descriptor.blob)),
        )

    def _oci_layer(self, descriptor: _Descriptor, diff_id: str) -> _FoundLayer:
        member = text(descriptor.blob)
        if not _LAYER_TYPE.fullmatch(descriptor.media_type):
            self._bad(member, f"layers of type {descriptor.media_type!r:.100} are not supported")
        if not self._files.has(descriptor.blob):
            where = " (it has to be had from elsewhere)" if descriptor.urls else ""
            raise ArchiveError(f"{self._name}: {member} is missing in it{where}", member=member)
        return _FoundLayer(
            layer=SourceLayer(name=member, diff_id=diff_id, size=descriptor.size),
            file=descriptor.blob,
            digest=descriptor.digest,
            size=descriptor.size,
        )

    def _diff_ids(self, config: dict[str, Json], member: str, count: int) -> list[str]:
        rootfs = self._object(config.get("rootfs"), member)
        if rootfs.get("type") != "layers":
            self._bad(member, "its rootfs is not made of layers")
        found = self._list(rootfs, "diff_ids", member) if rootfs.get("diff_ids") else []
        if len(found) != count:
            self._bad(member, f"names {len(found)} layers, the manifest {count}")
        if count > _LAYERS_MAX:
            self._bad(member, f"{count} layers; {_LAYERS_MAX} are allowed")
        return [check_digest(value, member=member) for value in found]

    # ---- docker save -----------------------------------------------------------------------

    def _docker(self, manifest: Json) -> _Found:
        member = "manifest.json"
        if not isinstance(manifest, list) or not manifest:
            self._bad(member, "is not a list of images")
        images = [self._object(entry, member) for entry in manifest]
        tags = [self._tags(image, member) for image in images]
        chosen = self._choose_docker(images, tags)
        name = self._string(chosen, "Config", member)
        config_name = self._file_name(name, member)
        data = self._bytes(config_name)
        digest = hashlib.sha256(data).hexdigest()
        promised = _CONFIG_NAME.fullmatch(name.rpartition("/")[2])
        if promised and promised[1] != digest:
            raise ArchiveError(
                f"{self._name}: {text(config_name)}: its digest is sha256:{digest}",
                member=text(config_name),
                found=f"sha256:{digest}",
                wanted=f"sha256:{promised[1]}",
            )
        config = self._object(self._parsed(data, text(config_name)), text(config_name))
        platform = self._platform_of(config, text(config_name))
        wanted = self._platform
        if wanted is not None and not (platform and platform.matches(wanted)):
            raise NotFoundError(
                f"{self._name} holds no image for {wanted}; it has {platform or 'unknown'}",
                platform=str(wanted),
            )
        values = self._list(chosen, "Layers", member)
        diff_ids = self._diff_ids(config, text(config_name), len(values))
        layers = []
        for value, diff_id in zip(values, diff_ids, strict=True):
            file = self._file_name(value, member)
            if not self._files.has(file):
                raise _missing(file, self._name)
            _, size, close = self._files.open(file)
            if close is not None:
                close()
            layer = SourceLayer(name=text(file), diff_id=diff_id, size=size)
            layers.append(_FoundLayer(layer=layer, file=file, digest=None, size=None))
        return _Found(
            kind="docker-archive",
            layers=tuple(layers),
            config=config,
            config_digest=f"sha256:{digest}",
            refs=tuple(self._tags(chosen, member)),
            platform=platform,
        )

    def _tags(self, image: dict[str, Json], member: str) -> list[str]:
        tags = image.get("RepoTags") or []
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            self._bad(member, "its RepoTags are no list of names")
        return tags

    def _choose_docker(
        self, images: list[dict[str, Json]], tags: list[list[str]]
    ) -> dict[str, Json]:
        pairs = list(zip(images, tags, strict=True))
        every = [tag for _, names in pairs for tag in names]
        if self._ref is not None:
            ref = self._ref
            pairs = [pair for pair in pairs if _names(pair[1], ref)]
            if not pairs:
                raise NotFoundError(
                    f"{self._name} holds no image {ref}; it has {_listed(every)}", ref=ref
                )
        if len({str(image.get("Config")) for image, _ in pairs}) > 1:
            raise UsageError(
                f"{self._name} holds several images, choose one with --ref: {_listed(every)}",
                source=self._name,
            )
        return pairs[0][0]

    def _file_name(self, value: Json, member: str) -> bytes:
        name = clean(os.fsencode(value)) if isinstance(value, str) else None
        if not name or b"\0" in name:
            self._bad(member, f"{value!r:.100} is no file of the archive")
        return name


def _names(refs: Iterable[str], wanted: str) -> bool:
    """Whether one of the names is meant: in full, as Docker shortens it, or by its tag."""
    full = _full_name(wanted)
    return any(ref == wanted or _full_name(ref) == full or _tag(ref) == wanted for ref in refs)


def _tag(ref: str) -> str:
    last = ref.rpartition("/")[2]
    return last.partition(":")[2] if ":" in last else ref


def _full_name(ref: str) -> str:
    """Docker's normal form: docker.io/library/NAME:latest."""
    if "@" not in ref and ":" not in ref.rpartition("/")[2]:
        ref += ":latest"
    host, slash, _ = ref.partition("/")
    if not slash:
        return "docker.io/library/" + ref
    if "." not in host and ":" not in host and host != "localhost":
        return "docker.io/" + ref
    return ref


def _label(candidate: _Candidate) -> str:
    name = candidate.refs[0] if candidate.refs else candidate.descriptor.digest[:19]
    return f"{name} ({candidate.platform})" if candidate.platform else name


def _listed(names: Iterable[str]) -> str:
    found = sorted(set(names))
    return ", ".join(found[:20]) + (", ..." if len(found) > 20 else "") or "none with a name"  # noqa: PLR2004
