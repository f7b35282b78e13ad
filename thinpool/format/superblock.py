"""The superblock, metadata block 0, and its copy in a metadata snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from thinpool.format.record import Record, nested, octets, u32, u64
from thinpool.format.space_map_root import SPACE_MAP_ROOT, SpaceMapRoot

ROOT_FIELD_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a commit writes last."""

    csum: int
    flags: int
    blocknr: int
    uuid: bytes
    magic: int
    version: int
    time: int
    trans_id: int
    held_root: int
    data_space_map: SpaceMapRoot
    data_space_map_rest: bytes
    metadata_space_map: SpaceMapRoot
    metadata_space_map_rest: bytes
    data_mapping_root: int
    device_details_root: int
    data_block_size: int
    metadata_block_size: int
    metadata_nr_blocks: int
    compat_flags: int
    compat_ro_flags: int
    incompat_flags: int


SUPERBLOCK = Record(
    "superblock",
    "Superblock",
    Superblock,
    u32("csum", "", "Checksum, salt 160774."),
    u32("flags", "bits", "Bit 0: needs_check. The others are carried along."),
    u64("blocknr", "metadata block", "Its own place: 0, or the metadata snapshot's block."),
    octets("uuid", 16, "Zeros from the kernel, which never reads it."),
    u64("magic", "", "27022010."),
    u32("version", "", "2. The kernel does not read it."),
    u32("time", "snapshots", "One more at each snapshot. Mappings keep 24 bits of it."),
    u64("trans_id", "", "Userland's transaction id; the kernel only compares and sets it."),
    u64("held_root", "metadata block", "Superblock copy of the metadata snapshot; 0 for none."),
    nested("data_space_map", SPACE_MAP_ROOT, "Reference counts of data blocks."),
    octets("data_space_map_rest", ROOT_FIELD_SIZE - SPACE_MAP_ROOT.size, "Zeros."),
    nested("metadata_space_map", SPACE_MAP_ROOT, "Reference counts of metadata blocks."),
    octets("metadata_space_map_rest", ROOT_FIELD_SIZE - SPACE_MAP_ROOT.size, "Zeros."),
    u64("data_mapping_root", "metadata block", "Top level of the mapping tree."),
    u64("device_details_root", "metadata block", "Root of the details tree."),
    u32("data_block_size", "sectors", "128 to 2097152, a multiple of 128."),
    u32("metadata_block_size", "sectors", "8. The kernel does not read it."),
    u64(
        "metadata_nr_blocks",
        "metadata blocks",
        "Size at format. Not kept up; the metadata space map's nr_blocks is the size.",
    ),
    u32("compat_flags", "bits", "0; others change nothing."),
    u32("compat_ro_flags", "bits", "0; with others the pool may only be read."),
    u32("incompat_flags", "bits", "0; with others the pool may not be opened."),
)
