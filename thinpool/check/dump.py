"""thin-provisioning-tools' XML, byte for byte as thin_dump 0.9 prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thinpool.check.reader import MetadataReader
from thinpool.check.source import opened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from thinpool.check.reader import DeviceDetails, SuperblockFacts
    from thinpool.check.source import Source


def dump_metadata(source: Source, *, use_metadata_snapshot: bool = False) -> Iterator[str]:
    """The XML, in pieces of some lines each.

    Args:
        source: the device, or its path.
        use_metadata_snapshot: dump the held one: of a pool in use.

    Raises:
        CorruptMetadataError: it cannot be followed; check says more.
        NotFoundError: no metadata snapshot is held.
    """
    with (
        opened(source) as device,
        MetadataReader(device, use_metadata_snapshot=use_metadata_snapshot) as reader,
    ):
        yield superblock_line(reader.superblock)
        for details in reader.devices():
            yield device_line(details)
            for batch, count in reader.raw_runs(details.id):
                yield "".join(
                    [
                        mapping_line(run.begin, run.data_begin, run.length, run.time)
                        for run in batch[0:count]
                    ]
                )
            yield "  </device>\n"
        yield "</superblock>\n"


def superblock_line(superblock: SuperblockFacts) -> str:
    """The opening tag. thin_dump prints no uuid."""
    return (
        f'<superblock uuid="" time="{superblock.time}" transaction="{superblock.transaction_id}" '
        f'flags="{superblock.flags}" version="{superblock.version}" '
        f'data_block_size="{superblock.data_block_size}" '
        f'nr_data_blocks="{superblock.nr_data_blocks}">\n'
    )


def device_line(details: DeviceDetails) -> str:
    """A device's opening tag."""
    return (
        f'  <device dev_id="{details.id}" mapped_blocks="{details.mapped_blocks}" '
        f'transaction="{details.transaction_id}" creation_time="{details.creation_time}" '
        f'snap_time="{details.snapshotted_time}">\n'
    )


def mapping_line(begin: int, data_begin: int, length: int, time: int) -> str:
    """One run."""
    if length == 1:
        return (
            f'    <single_mapping origin_block="{begin}" data_block="{data_begin}" '
            f'time="{time}"/>\n'
        )
    return (
        f'    <range_mapping origin_begin="{begin}" data_begin="{data_begin}" '
        f'length="{length}" time="{time}"/>\n'
    )
