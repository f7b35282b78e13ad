"""Images and files: import, export, diff. They run in the caller's process and mount privately."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final

from thinpool import errors
from thinpool.api.session import Session, existing_volume, refuse_taken
from thinpool.api.workbench import Finished, Workbench
from thinpool.host.failures import failure
from thinpool.model import Exported, FileChange, Progress, Volume
from thinpool.names import parse_ref, same_pool
from thinpool.oci.archive import open_source
from thinpool.oci.diff import iter_changes
from thinpool.oci.export import iter_tar
from thinpool.oci.importer import import_image as import_layers
from thinpool.store import poolfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from thinpool.server.client import PoolClient
    from thinpool.server.raw import VolumeHandle

CHAIN_ID: Final = "chain-id"
DIFF_ID: Final = "diff-id"
REF: Final = "ref"
BASE: Final = "base"
_LAYER_DIGITS: Final = 12
_COPY_BYTES: Final = 1 << 20


# ---- import -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Layer:
    """One layer in the making: a hidden snapshot, mounted."""

    target: _PoolTarget
    volume: Volume
    parent: str | None
    root_fd: int
    stack: contextlib.ExitStack

    def seal(self, *, chain_id: str, diff_id: str) -> None:
        """Unmount it with everything on it, and make it a parent for the next."""
        self.stack.close()
        sealed = self.target.bench.seal(self.volume)
        self.target.built[chain_id] = sealed
        self.target.labels[chain_id] = {CHAIN_ID: chain_id, DIFF_ID: diff_id}

    def abort(self) -> None:
        """Unmount it; it goes with the lease."""
        with contextlib.suppress(errors.ThinpoolError, OSError):
            self.stack.close()


class _PoolTarget:
    """Layers as snapshots of each other. Those already there are found by their chain ids."""

    def __init__(
        self,
        client: PoolClient,
        bench: Workbench,
        base: Volume,
        *,
        base_chain: str | None,
        size: int | None,
    ) -> None:
        self.client = client
        self.bench = bench
        self.base = base
        self.base_chain = base_chain
        self.size = size
        self.built: dict[str, Volume] = {}
        """By chain id, lowest first, what goes or stays together."""
        self.labels: dict[str, dict[str, str]] = {}
        self._found: dict[str, Volume | None] = {}

    def find(self, chain_id: str) -> Volume | None:
        """A sealed stack of layers."""
        if chain_id in self.built:
            return self.built[chain_id]
        if chain_id == self.base_chain:
            return self.base
        if chain_id not in self._found:
            arguments = {"key": CHAIN_ID, "value": chain_id}
            found = [Volume.from_json(each) for each in self.client.call("by_label", arguments)]
            sealed = [each for each in found if each.read_only]
            self._found[chain_id] = sealed[0] if sealed else None
        return self._found[chain_id]

    def has(self, chain_id: str) -> bool:
        """Whether it is there."""
        return self.find(chain_id) is not None

    def begin(self, parent: str | None, *, chain_id: str | None) -> _Layer:  # noqa: ARG002 - of the protocol
        """A snapshot of the parent, mounted."""
        below = self.base if parent is None else self.find(parent)
        if below is None:
            raise errors.NotFoundError(f"the layers {parent} are not in the pool", chain_id=parent)
        volume = self.bench.snapshot(below.name, kind="image", size=self._size_over(below))
        if volume.size > below.size:
            self.bench.grow_filesystem(volume)
        stack = contextlib.ExitStack()
        root = stack.enter_context(self.bench.mounted(volume))
        return _Layer(target=self, volume=volume, parent=parent, root_fd=root, stack=stack)

    def _size_over(self, below: Volume) -> int | None:
        return self.size if self.size is not None and self.size > below.size else None


def import_image(
    session: Session,
    image: str,
    source: Path | str | BinaryIO,
    *,
    parent: str | None,
    size: int | None,
    ref: str | None,
    platform: str | None,
    progress: Callable[[Progress], None] | None,
    note: Callable[[str], None] | None,
) -> Volume:
    """Import an image."""
    client, name = session.of(image)
    refuse_taken(client, name)
    base = _base(client, image, parent)
    if size is not None and size < base.size:
        raise errors.UsageError(
            f"an image cannot be smaller than what it stands on, which has {base.size} bytes: "
            f"{size} were asked for",
            what="size",
            value=size,
            smallest=base.size,
        )
    given = source if isinstance(source, (str, Path)) else source.fileno()
    # An archive that must be read twice is kept where there is room for pools, not in /tmp.
    spool = poolfile.pool_directory(session.root, name.pool)
    with (
        open_source(given, ref=ref, platform=platform, spool_directory=spool, note=note) as opened,
        Workbench(client) as bench,
        bench.filling(),
    ):
        chain = _chain_of(base) if parent is not None else None
        target = _PoolTarget(client, bench, base, base_chain=chain, size=size)
        imported = import_layers(opened, target, parent=chain, progress=progress)
        if note is not None:
            for line in imported.notes:
                note(line)
        top = imported.chain_id
        labels: dict[str, str] = {}
        if imported.layers and top is not None:
            labels.update(target.labels.get(top, {CHAIN_ID: top}))
        if imported.refs or ref:
            labels[REF] = ref or imported.refs[0]
        if imported.config_digest:
            labels["config-digest"] = imported.config_digest
        return _publish(client, bench, target, name.name, top=top, labels=labels)


def _chain_of(parent: Volume) -> str:
    """Its chain id. One that has none begins a chain of its own, which nothing else can be on."""
    made = parent.created.timestamp()
    return parent.labels.get(CHAIN_ID, f"volume:{parent.pool}:{parent.id}:{made:.0f}")


def _base(client: PoolClient, image: str, parent: str | None) -> Volume:
    """What the lowest layer stands on."""
    if parent is None:
        try:
            return Volume.from_json(client.call("get", {"name": BASE}))
        except errors.NotFoundError as cause:
            raise errors.NotFoundError(
                f"the pool of {image} has no base device: give --parent", name=BASE
            ) from cause
    ref = parse_ref(parent)
    same_pool(parse_ref(image), ref)
    found = Volume.from_json(client.call("get", {"name": ref.name}))
    if not found.read_only:
        raise errors.UsageError(
            f"{parent} is writable: commit it to an image first", what="parent", value=parent
        )
    return found


def _publish(
    client: PoolClient,
    bench: Workbench,
    target: _PoolTarget,
    name: str,
    *,
    top: str | None,
    labels: Mapping[str, str],
) -> Volume:
    """Every layer that was built, and the image, all or none."""
    found = target.base if top is None else target.find(top)
    if found is None:
        raise errors.NotFoundError(f"the layers {top} are not in the pool", chain_id=top)
    if top is None or top not in target.built:
        # Everything was there: the image is one more name for it, a snapshot without a byte.
        wanted = target.size
        volume = bench.snapshot(found.name, kind="image", size=wanted)
        if volume.size > found.size:
            bench.grow_filesystem(volume)
    else:
        volume = found
    items = [
        Finished(
            volume=layer,
            publish_as=_layer_name(client, chain, layer),
            kind="image",
            read_only=True,
            labels=target.labels[chain],
            filesystem=layer.filesystem,
        )
        for chain, layer in target.built.items()
        if chain != top
    ]
    items.append(
        Finished(
            volume=volume,
            publish_as=name,
            kind="image",
            read_only=True,
            labels=labels,
            filesystem=volume.filesystem or found.filesystem,
        )
    )
    return bench.publish(*items)[-1]


def _layer_name(client: PoolClient, chain_id: str, layer: Volume) -> str:
    """A name for a layer below an image; with its id where another import was faster."""
    digest = chain_id.partition(":")[2] or chain_id
    short = f"layer-{digest[:_LAYER_DIGITS]}"
    return short if existing_volume(client, short) is None else f"{short}-{layer.id}"


# ---- reading volumes --------------------------------------------------------------------------


@contextlib.contextmanager
def still(client: PoolClient, bench: Workbench, name: str) -> Iterator[Volume]:
    """A volume that does not change: itself if it is sealed, else a settled snapshot of it."""
    found = Volume.from_json(client.call("get", {"name": name}))
    snapshot = bench.snapshot(name, kind=found.kind)
    bench.settle(snapshot)
    yield replace(snapshot, filesystem=found.filesystem)


def diff(
    session: Session,
    first: str,
    second: str,
    *,
    progress: Callable[[Progress], None] | None,
) -> list[FileChange]:
    """Which files differ."""
    client, _, names = session.of_all([first, second])
    done = 0

    def tell(entries: int) -> None:
        nonlocal done
        done += entries
        if progress is not None:
            progress(
                Progress(operation="diff", step="comparing", done=done, total=None, unit="entries")
            )

    for name in names:  # nothing is begun for what is not there
        client.call("get", {"name": name})
    with Workbench(client) as bench, contextlib.ExitStack() as stack:
        roots = []
        for name, asked in zip(names, (first, second), strict=True):
            volume = stack.enter_context(still(client, bench, name))
            mounted = bench.mounted(volume, read_only=True, called=asked)
            roots.append(stack.enter_context(mounted))
        return [
            FileChange(path=os.fsdecode(change.path), change=change.kind)
            for change in iter_changes(roots[0], roots[1], progress=tell)
        ]


# ---- export -----------------------------------------------------------------------------------


def export(
    session: Session,
    volume: str,
    output: Path | str | BinaryIO,
    *,
    raw: bool,
    progress: Callable[[Progress], None] | None,
) -> Exported:
    """Write a tar, or the device."""
    client, ref = session.of(volume)
    found = Volume.from_json(client.call("get", {"name": ref.name}))
    with (
        _output(output) as (stream, path),  # first: nothing is begun for what cannot be written
        Workbench(client) as bench,
        still(client, bench, ref.name) as source,
    ):
        if raw:
            with bench.raw(source, writable=False) as handle:
                written = _write_raw(handle, stream, source.mapped, progress)
        else:
            with bench.mounted(source, read_only=True, called=volume) as root:
                written = _write_tar(root, stream, progress)
        stream.flush()
    return Exported(volume=found, output=path, written=written)


@contextlib.contextmanager
def _output(output: Path | str | BinaryIO) -> Iterator[tuple[IO[bytes], str | None]]:
    """The stream; a file appears under its name when it is whole."""
    if not isinstance(output, (str, Path)):
        yield output, None
        return
    if output == "-":
        yield sys.stdout.buffer, None
        return
    path = Path(output)
    if path.exists() and not path.is_file():  # a device or a pipe: written in place
        with path.open("wb") as stream:
            yield stream, str(path)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as stream:
            yield stream, str(path)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as cause:
        raise failure(cause, f"cannot write {path}", path=str(path)) from cause
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _write_tar(root: int, stream: IO[bytes], progress: Callable[[Progress], None] | None) -> int:
    written = 0
    for piece in iter_tar(root):
        stream.write(piece)
        written += len(piece)
        if progress is not None:
            progress(Progress(operation="export", step="files", done=written, total=None))
    return written


def _write_raw(
    handle: VolumeHandle,
    stream: IO[bytes],
    mapped: int,
    progress: Callable[[Progress], None] | None,
) -> int:
    """The device: holes where the output can have them, else zeros."""
    sparse = _can_seek(stream)
    written = position = 0
    while position < handle.size:
        stretch = handle.next_data(position)
        begin, end = stretch if stretch is not None else (handle.size, handle.size)
        if sparse:
            stream.seek(begin)
        else:
            _write_zeros(stream, begin - position)
        position = begin
        while position < end:
            data = handle.read(position, min(_COPY_BYTES, end - position))
            stream.write(data)
            position += len(data)
            written += len(data)
            if progress is not None:
                step = Progress(
                    operation="export", step="device", done=written, total=max(mapped, written)
                )
                progress(step)
    if sparse:
        stream.truncate(handle.size)
    return written


def _can_seek(stream: IO[bytes]) -> bool:
    try:
        return stream.seekable() and stream.tell() == 0
    except OSError:
        return False


def _write_zeros(stream: IO[bytes], length: int) -> None:
    zeros = bytes(_COPY_BYTES)
    while length:
        part = min(length, len(zeros))
        stream.write(zeros[:part])
        length -= part
