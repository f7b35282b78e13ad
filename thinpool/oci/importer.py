"""An image brought to where layers live, layer by layer.

What a layer becomes is the target's: :class:`LayerTarget` says whether it has a stack of layers
already, gives a root directory for a new one on top of another, and seals or drops it. Layers that
are there are not read again. A layer is sealed only after its last byte was verified; on an error
or an interrupt the one in work is dropped, and those sealed before it stay, so that another try
goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from thinpool.errors import ThinpoolError
from thinpool.model import Progress
from thinpool.oci.archive import ImageSource, SourceLayer, chain_id
from thinpool.oci.extract import Extracted, Extractor, Limits, target_error

if TYPE_CHECKING:
    from collections.abc import Callable

_PROGRESS_BYTES: Final = 1 << 20


class TargetLayer(Protocol):
    """A layer being made: exactly one of :meth:`seal` and :meth:`abort` ends it."""

    @property
    def root_fd(self) -> int:
        """Its root directory, holding what its parent holds; open until it ends."""
        ...

    def seal(self, *, chain_id: str, diff_id: str) -> None:
        """Make it durable, read-only and known by its chainID.

        Whoever implements this flushes the filesystem first (syncfs, whose errors an unmount does
        not report): a full pool may show only there, and has to be an error of this call.
        """
        ...

    def abort(self) -> None:
        """Drop it; also after :meth:`seal` failed."""
        ...


class LayerTarget(Protocol):
    """Where layers live."""

    def has(self, chain_id: str) -> bool:
        """Whether this stack of layers is there, sealed."""
        ...

    def begin(self, parent: str | None, *, chain_id: str | None) -> TargetLayer:
        """Begin a layer.

        Args:
            parent: the chainID of what it stands on; None for the empty base.
            chain_id: its own; None where only the end of the tar will tell.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedLayer:
    """One layer of an imported image.

    Attributes:
        chain_id: by which the target knows it.
        diff_id: the digest of its uncompressed tar.
        extracted: what unpacking did; None where the target had it.
    """

    chain_id: str
    diff_id: str
    extracted: Extracted | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedImage:
    """An image that is now in the target.

    Attributes:
        chain_id: of its top; None for an image without layers on the empty base.
        layers: lowest first.
        config: the image's config (labels, environment, command), None for tars and directories.
        config_digest: of the config's bytes.
        refs: the names that the archive has for it.
        notes: what was left out, for people.
    """

    chain_id: str | None
    layers: tuple[ImportedLayer, ...]
    config: dict[str, Any] | None
    config_digest: str | None
    refs: tuple[str, ...]
    notes: tuple[str, ...]


def import_image(
    source: ImageSource,
    target: LayerTarget,
    *,
    parent: str | None = None,
    limits: Limits | None = None,
    ignore_ownership: bool = False,
    best_effort_xattrs: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> ImportedImage:
    """Bring an image to a target.

    Args:
        source: stays the caller's to close.
        target: where its layers go.
        parent: the chainID of an image in the target that the lowest layer stands on.
        limits: of each layer.
        ignore_ownership: see :class:`~thinpool.oci.extract.Extractor`.
        best_effort_xattrs: likewise.
        progress: told about every MiB read.

    Raises:
        ArchiveError: the archive is damaged, lies, or tries to escape.
        NoSpaceError: the target is full.
        ThinpoolError: others, from unpacking and from the target.
    """
    work = _Import(
        source,
        target,
        limits=limits,
        ignore_ownership=ignore_ownership,
        best_effort_xattrs=best_effort_xattrs,
        progress=progress,
    )
    chains = _chains(parent, source.layers)
    done: list[ImportedLayer] = []
    present = _present(target, chains)
    for index, layer in enumerate(source.layers):
        chain = chains[index]
        if index < present and chain is not None and layer.diff_id is not None:
            work.skip(layer)
            done.append(ImportedLayer(chain_id=chain, diff_id=layer.diff_id, extracted=None))
        else:
            below = done[-1].chain_id if done else parent
            done.append(work.layer(index, below=below, chain=chain))
    notes = [note for layer in done if layer.extracted for note in layer.extracted.notes]
    return ImportedImage(
        chain_id=done[-1].chain_id if done else parent,
        layers=tuple(done),
        config=source.config,
        config_digest=source.config_digest,
        refs=source.refs,
        notes=tuple(notes),
    )


def _chains(parent: str | None, layers: tuple[SourceLayer, ...]) -> list[str | None]:
    """The chainID of each layer, as far as its diffID and those below are known."""
    chains: list[str | None] = []
    at = parent
    known = True
    for layer in layers:
        known = known and layer.diff_id is not None
        if known and layer.diff_id is not None:
            at = chain_id(at, layer.diff_id)
        chains.append(at if known else None)
    return chains


def _present(target: LayerTarget, chains: list[str | None]) -> int:
    """How many layers from the lowest on need no work.

    Looked for from the top: a stack is there whole even if images of its lower parts were deleted.
    """
    for index in range(len(chains) - 1, -1, -1):
        chain = chains[index]
        if chain is not None and target.has(chain):
            return index + 1
    return 0


class _Import:
    """The layers of one import, with its progress."""

    def __init__(
        self,
        source: ImageSource,
        target: LayerTarget,
        *,
        limits: Limits | None,
        ignore_ownership: bool,
        best_effort_xattrs: bool,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._source = source
        self._target = target
        self._limits = limits
        self._ignore_ownership = ignore_ownership
        self._best_effort_xattrs = best_effort_xattrs
        self._progress = progress
        self._done = 0
        self._told = -_PROGRESS_BYTES
        self._step = ""
        sizes = [layer.size for layer in source.layers]
        known = [size for size in sizes if size is not None]
        self._total = sum(known) if len(known) == len(sizes) else None

    def _passed(self, size: int) -> None:
        self._done += size
        if self._progress is not None and self._done - self._told >= _PROGRESS_BYTES:
            self._tell()

    def _tell(self) -> None:
        self._told = self._done
        if self._progress is not None:
            self._progress(
                Progress(operation="import", step=self._step, done=self._done, total=self._total)
            )

    def skip(self, layer: SourceLayer) -> None:
        """The target has this layer."""
        self._done += layer.size or 0
        self._tell()

    def layer(self, index: int, *, below: str | None, chain: str | None) -> ImportedLayer:
        """Unpack one layer on another."""
        entry = self._source.layers[index]
        self._step = f"layer {index + 1} of {len(self._source.layers)}"
        self._tell()
        made = self._target.begin(below, chain_id=chain)
        try:
            extracted, diff_id = self._unpack(index, made.root_fd)
            found = chain or chain_id(below, diff_id)
            if chain is None and self._target.has(found):
                made.abort()
                return ImportedLayer(chain_id=found, diff_id=diff_id, extracted=None)
            made.seal(chain_id=found, diff_id=diff_id)
        except BaseException as error:
            self._abort(made, error)
            if isinstance(error, OSError):
                raise target_error(error, member=entry.name) from error
            raise
        self._tell()
        return ImportedLayer(chain_id=found, diff_id=diff_id, extracted=extracted)

    def _unpack(self, index: int, root_fd: int) -> tuple[Extracted, str]:
        entry = self._source.layers[index]
        with self._source.open_layer(index, progress=self._passed) as stream:
            extractor = Extractor(
                root_fd,
                limits=self._limits,
                ignore_ownership=self._ignore_ownership,
                best_effort_xattrs=self._best_effort_xattrs,
                whiteouts=entry.whiteouts,
            )
            extracted = extractor.apply(stream, archive=entry.name, need_end=entry.need_end)
            return extracted, stream.diff_id

    @staticmethod
    def _abort(made: TargetLayer, error: BaseException) -> None:
        """Drop the layer; what went wrong first is what is reported."""
        try:
            made.abort()
        except (ThinpoolError, OSError) as second:
            error.add_note(f"dropping the unfinished layer failed too: {second}")
