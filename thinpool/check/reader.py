"""Superblock, devices and their mappings as runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thinpool._native import ffi, lib
from thinpool.engine.handle import Handle
from thinpool.engine.status import check as check_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.engine.bdev import BlockDevice

BATCH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperblockFacts:
    """What the superblock says of the pool.

    Attributes:
        uuid: 16 bytes; the kernel leaves zeros there.
        flags: bit 0 is needs_check.
        version: 2, or what somebody wrote there.
        time: of the pool, one more at each snapshot.
        transaction_id: userland's.
        data_block_size: sectors.
        held_root: metadata block of the metadata snapshot; 0 for none.
        nr_data_blocks: 0 in a metadata snapshot.
        nr_metadata_blocks: 0 in a metadata snapshot.
    """

    uuid: bytes
    flags: int
    version: int
    time: int
    transaction_id: int
    data_block_size: int
    held_root: int
    nr_data_blocks: int
    nr_metadata_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDetails:
    """One device.

    Attributes:
        id: the device's.
        mapped_blocks: as its details say.
        transaction_id: the pool's when it was made.
        creation_time: the pool's time then.
        snapshotted_time: the pool's time at its last snapshot; older mappings may be shared.
    """

    id: int
    mapped_blocks: int
    transaction_id: int
    creation_time: int
    snapshotted_time: int


@dataclass(frozen=True, slots=True)
class Run:
    """Virtual blocks that are mapped to as many neighbouring data blocks at the same time.

    Attributes:
        begin: first virtual block.
        data_begin: first data block.
        length: blocks.
        time: when they were mapped.
    """

    begin: int
    data_begin: int
    length: int
    time: int


class MetadataReader(Handle):
    """Reads a metadata device that can be trusted so far; a fault on the way is an error.

    One thread at a time.
    """

    def __init__(self, device: BlockDevice, *, use_metadata_snapshot: bool = False) -> None:
        """Read the superblock and the devices.

        Raises:
            CorruptMetadataError: they are not what the format says.
            NotFoundError: no metadata snapshot is held.
        """
        opened = ffi.new("struct tp_dump **")
        self._path = device.name
        with device.in_call() as (pointer, err):
            status = lib.tp_dump_open(pointer, use_metadata_snapshot, opened, err)
            check_status(status, err, path=self._path)
        super().__init__(opened[0], lib.tp_dump_close, above=(device,), what="a metadata reader")

    def _free(self, pointer: Any) -> None:  # noqa: ANN401 - cffi's data has no type
        lib.tp_dump_close(pointer)

    @property
    def superblock(self) -> SuperblockFacts:
        """The superblock."""
        found = ffi.new("struct tp_dump_superblock *")
        with self.in_call() as (pointer, _):
            lib.tp_dump_get_superblock(pointer, found)
        return SuperblockFacts(
            uuid=bytes(found.uuid),
            flags=int(found.flags),
            version=int(found.version),
            time=int(found.time),
            transaction_id=int(found.transaction_id),
            data_block_size=int(found.data_block_size),
            held_root=int(found.held_root),
            nr_data_blocks=int(found.nr_data_blocks),
            nr_metadata_blocks=int(found.nr_metadata_blocks),
        )

    def devices(self) -> Iterator[DeviceDetails]:
        """All devices in id order."""
        batch = ffi.new("struct tp_dump_device[]", BATCH)
        count = ffi.new("size_t *")
        index = 0
        while True:
            with self.in_call() as (pointer, err):
                check_status(lib.tp_dump_devices(pointer, index, batch, BATCH, count), err)
            if count[0] == 0:
                return
            index += int(count[0])
            for device in ffi.unpack(batch, count[0]):
                yield DeviceDetails(
                    id=int(device.id),
                    mapped_blocks=int(device.mapped_blocks),
                    transaction_id=int(device.transaction_id),
                    creation_time=int(device.creation_time),
                    snapshotted_time=int(device.snapshotted_time),
                )

    def raw_runs(self, device_id: int) -> Iterator[tuple[Any, int]]:
        """Batches of ``struct tp_dump_run`` and how many; each is valid until the next."""
        batch = ffi.new("struct tp_dump_run[]", BATCH)
        count = ffi.new("size_t *")
        with self.in_call() as (pointer, err):
            check_status(lib.tp_dump_select(pointer, device_id, err), err, path=self._path)
        while True:
            with self.in_call() as (pointer, err):
                status = lib.tp_dump_next(pointer, batch, BATCH, count, err)
                check_status(status, err, path=self._path)
            if count[0] == 0:
                return
            yield batch, int(count[0])

    def runs(self, device_id: int) -> Iterator[Run]:
        """One device's mappings, in order, each run as long as it can be.

        Raises:
            NotFoundError: there is no such device.
        """
        for batch, count in self.raw_runs(device_id):
            for index in range(count):
                run = batch[index]
                yield Run(int(run.begin), int(run.data_begin), int(run.length), int(run.time))
