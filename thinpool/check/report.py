"""A full check: every tree, every count of both space maps, each fault named with its block."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from thinpool._native import ffi, lib
from thinpool.check.source import none_if_nothing, opened
from thinpool.engine.handle import Handle
from thinpool.engine.status import check as check_status
from thinpool.model import CheckReport, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.check.source import Source
    from thinpool.engine.bdev import BlockDevice

PROGRESS_SECONDS = 0.1


class _Check(Handle):
    """One ``struct tp_check``."""

    def __init__(self, device: BlockDevice, **options: int) -> None:
        made = ffi.new("struct tp_check **")
        with device.in_call() as (pointer, err):
            wanted = ffi.new("struct tp_check_options *", options)
            check_status(lib.tp_check_create(pointer, wanted, made, err), err, path=device.name)
        super().__init__(made[0], lib.tp_check_destroy, above=(device,), what="a check")
        self._path = device.name

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        lib.tp_check_destroy(pointer)

    def run(self) -> None:
        """Look; may block for long."""
        with self.in_call() as (pointer, err):
            check_status(lib.tp_check_run(pointer, err), err, path=self._path)

    def cancel(self) -> None:
        """Make run end soon."""
        with self.in_call() as (pointer, _):
            lib.tp_check_cancel(pointer)

    def progress(self) -> tuple[int, int]:
        """Metadata blocks done, and how many there may be."""
        progress = ffi.new("struct tp_check_progress *")
        with self.in_call() as (pointer, _):
            lib.tp_check_get_progress(pointer, progress)
        return int(progress.done), int(progress.total)

    def summary(self) -> Any:  # noqa: ANN401 - cffi's data has no type
        """The counters."""
        summary = ffi.new("struct tp_check_summary *")
        with self.in_call() as (pointer, _):
            lib.tp_check_get_summary(pointer, summary)
        return summary

    def faults(self, count: int) -> Iterator[Fault]:
        """What was found."""
        fault = ffi.new("struct tp_check_fault *")
        with self.in_call() as (pointer, _):
            for index in range(count):
                check_status(lib.tp_check_get_fault(pointer, index, fault))
                yield _fault(fault)


def _name(pointer: Any) -> str:  # noqa: ANN401 - cffi's data has no type
    return str(ffi.string(pointer).decode())


def _fault(fault: Any) -> Fault:  # noqa: ANN401 - cffi's data has no type
    return Fault(
        type=_name(lib.tp_check_type_name(fault.type)),
        severity=_name(lib.tp_check_severity_name(fault.severity)),
        structure=_name(lib.tp_check_structure_name(fault.structure)).replace(" ", "-"),
        block=int(fault.block),
        device_id=none_if_nothing(fault.device_id),
        message=_name(fault.message),
        data_block=none_if_nothing(fault.data_block),
        length=int(fault.length),
        found=int(fault.found),
        wanted=int(fault.wanted),
    )


def _run(handle: _Check, progress: Callable[[int, int], None] | None) -> None:
    """Run in a thread of its own, so that progress is told and an interrupt stops it."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            handle.run()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=work, name="thinpool-check", daemon=True)
    thread.start()
    try:
        while True:
            thread.join(PROGRESS_SECONDS)
            if progress is not None:
                progress(*handle.progress())
            if not thread.is_alive():
                break
    except BaseException:
        handle.cancel()
        thread.join()
        raise
    if failures:
        raise failures[0]


def check_metadata(
    source: Source,
    *,
    pool: str | None = None,
    use_metadata_snapshot: bool = False,
    skip_mappings: bool = False,
    nr_data_blocks: int | None = None,
    threads: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check a metadata device. Reads only, whatever it finds.

    Args:
        source: the device, or its path.
        pool: its name, for the report.
        use_metadata_snapshot: check the held one, whose space maps are blank: of a pool in use.
        skip_mappings: do not read the devices' trees; counts are not compared then.
        nr_data_blocks: how many blocks the data device has; None for what the space map says.
        threads: of the C core.
        progress: told metadata blocks done and in all, from this thread.

    Returns:
        What was found; ``clean`` when no fault is fatal or a leak.

    Raises:
        StorageIOError: the superblock could not be read.
        NotFoundError, NotPermittedError: the device could not be opened.
    """
    with (
        opened(source) as device,
        _Check(
            device,
            use_metadata_snapshot=use_metadata_snapshot,
            skip_mappings=skip_mappings,
            nr_data_blocks=nr_data_blocks or 0,
            nr_threads=threads,
        ) as handle,
    ):
        _run(handle, progress)
        summary = handle.summary()
        faults = tuple(handle.faults(int(summary.nr_faults)))
        # Without a superblock that can be trusted, there is no transaction id.
        known = bool(summary.superblock_valid)
        return CheckReport(
            pool=pool,
            clean=not (summary.nr_fatal or summary.nr_leaks),
            transaction_id=int(summary.transaction_id) if known else None,
            faults=faults,
            needs_check=bool(summary.needs_check) if known else None,
            devices=int(summary.nr_devices),
            mappings=int(summary.nr_mappings),
            leaked_data_blocks=int(summary.nr_leaked_data_blocks),
            leaked_metadata_blocks=int(summary.nr_leaked_metadata_blocks),
            omitted=int(summary.nr_fatal + summary.nr_leaks + summary.nr_notes) - len(faults),
        )
