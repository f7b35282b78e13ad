"""Errors are types with attributes; the text says what was asked, what is in the way, what to do.

Front ends map these types, never their text, to exit codes, HTTP replies and the like: one table
each. Every attribute is JSON-serialisable and is what a remote caller gets back.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ThinpoolError(Exception):
    """Base of all errors of this package.

    Attributes:
        kind: the stable name by which front ends and the wire protocol know the type.
        attributes: what the type carries besides its message.
    """

    kind: ClassVar[str] = "failed"

    def __init__(self, message: str, **attributes: Any) -> None:  # noqa: ANN401 - JSON values
        """Keep the message and the attributes."""
        super().__init__(message)
        self.message = message
        self.attributes: dict[str, Any] = attributes

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - as above
        """Attributes read as fields."""
        try:
            return self.__dict__["attributes"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive pickling with the attributes."""
        return (_rebuild, (type(self), self.message, self.attributes))


def _rebuild(cls: type[ThinpoolError], message: str, attributes: dict[str, Any]) -> ThinpoolError:
    return cls(message, **attributes)


class UsageError(ThinpoolError):
    """A name that is no name, a size out of range, an argument that cannot be."""

    kind = "usage"


class NotFoundError(ThinpoolError):
    """No such pool, volume, image, file."""

    kind = "not_found"


class AlreadyExistsError(ThinpoolError):
    """The name or id is taken; ``existing`` describes what has it, so that a retry can compare."""

    kind = "already_exists"


class BusyError(ThinpoolError):
    """In use: ``holder`` says by whom where that is known."""

    kind = "busy"


class ClosedError(ThinpoolError):
    """The handle was closed before the call."""

    kind = "closed"


class InterruptedError_(ThinpoolError):  # noqa: N801, N818 - the builtin has the bare name
    """The user or a signal stopped the operation; it was undone."""

    kind = "interrupted"


class NoSpaceError(ThinpoolError):
    """No room left."""

    kind = "no_space"


class DataSpaceError(NoSpaceError):
    """The pool's data space is full: ``used``, ``total`` in bytes where known."""

    kind = "data_space"


class MetadataSpaceError(NoSpaceError):
    """The pool's metadata space is full but for its reserve."""

    kind = "metadata_space"


class HostSpaceError(NoSpaceError):
    """The filesystem that holds the pool's files is full: ``path``."""

    kind = "host_space"


class CorruptMetadataError(ThinpoolError):
    """What is on disk is not what the format says: ``block``, ``found``, ``wanted``."""

    kind = "corrupt"


class ChecksumError(CorruptMetadataError):
    """A block's checksum is wrong."""

    kind = "checksum"


class UnsupportedFormatError(CorruptMetadataError):
    """A version or feature flag that this program does not know."""

    kind = "unsupported_format"


class NeedsCheckError(ThinpoolError):
    """The pool is read-only until it was checked: a flush or a metadata write failed."""

    kind = "needs_check"


class ReadOnlyError(ThinpoolError):
    """The pool or the volume is read-only."""

    kind = "read_only"


class ForeignDataError(ThinpoolError):
    """A device or file already carries something: ``path``, ``carries``."""

    kind = "foreign_data"


class NotPermittedError(ThinpoolError):
    """This user may not: ``operation``."""

    kind = "not_permitted"


class UnsupportedHostError(ThinpoolError):
    """This host lacks what is needed: ``missing``."""

    kind = "unsupported_host"


class NotThereYetError(ThinpoolError):
    """A command or option that a later version brings."""

    kind = "not_there_yet"


class NoMemoryError(ThinpoolError):
    """The host has no memory left."""

    kind = "no_memory"


class PoolFailedError(ThinpoolError):
    """The pool gave up: its metadata can be neither read nor written."""

    kind = "pool_failed"


class StorageIOError(ThinpoolError):
    """The host's I/O failed: ``errno``, ``path``, ``block`` where known."""

    kind = "io"


class TransactionIdError(ThinpoolError):
    """The pool's transaction id is not the one expected: ``found``, ``wanted``."""

    kind = "transaction_id"


class LimitError(ThinpoolError):
    """A limit of the on-disk format was met."""

    kind = "limit"


class ArchiveError(ThinpoolError):
    """An image archive that is cut short, lies about a digest or tries to escape: ``member``."""

    kind = "archive"


class TimeoutError_(BusyError):  # noqa: N801, N818 - the builtin has the bare name
    """A lock or a device was not to be had within ``timeout`` seconds."""

    kind = "timeout"


class DeviceMapperError(ThinpoolError):
    """The kernel's device-mapper refused: ``command`` (the ioctl), ``device``, ``errno``, ``log``.

    Refusals with a better name (busy, not found, …) have that type, and these attributes too.
    """

    kind = "device_mapper"


class ServerError(ThinpoolError):
    """The pool's server could not be started or broke off."""

    kind = "server"


def device_gone(pool: str, path: str) -> NotFoundError:
    """What to raise where a file or device of a pool is not where pool.json says."""
    return NotFoundError(
        f"pool {pool}: {path} is gone; bring it back, or forget the pool with "
        f"'thinpool detach-pool {pool}'",
        pool=pool,
        path=path,
    )


def by_kind() -> dict[str, type[ThinpoolError]]:
    """Every error type by its wire name."""
    found: dict[str, type[ThinpoolError]] = {}
    stack: list[type[ThinpoolError]] = [ThinpoolError]
    while stack:
        cls = stack.pop()
        found[cls.kind] = cls
        stack.extend(cls.__subclasses__())
    return found
