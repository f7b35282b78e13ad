"""The on-disk records of dm-thin metadata, version 2: for tools, documents and tests.

Never on the data path. disk_format.h declares the same for the C core, and a test keeps the two
equal.
"""

from __future__ import annotations

from typing import Any, Final

from thinpool.format.bitmap import BITMAP, Bitmap
from thinpool.format.checksum import Salt, checksum, kind_of, sealed
from thinpool.format.device_details import DEVICE_DETAILS, Details
from thinpool.format.index_entry import INDEX_ENTRY, IndexEntry
from thinpool.format.mapping import MAPPING, MappingValue
from thinpool.format.metadata_index import METADATA_INDEX, MetadataIndex
from thinpool.format.node_header import NODE_HEADER, NodeHeader
from thinpool.format.record import BLOCK_SIZE, Field, Record
from thinpool.format.ref_count import REF_COUNT, RefCount
from thinpool.format.space_map_root import SPACE_MAP_ROOT, SpaceMapRoot
from thinpool.format.superblock import SUPERBLOCK, Superblock

RECORDS: Final[tuple[Record[Any], ...]] = (
    SUPERBLOCK,
    SPACE_MAP_ROOT,
    NODE_HEADER,
    DEVICE_DETAILS,
    MAPPING,
    METADATA_INDEX,
    INDEX_ENTRY,
    BITMAP,
    REF_COUNT,
)
"""All of them, in the order of the document."""

__all__ = [
    "BITMAP",
    "BLOCK_SIZE",
    "DEVICE_DETAILS",
    "INDEX_ENTRY",
    "MAPPING",
    "METADATA_INDEX",
    "NODE_HEADER",
    "RECORDS",
    "REF_COUNT",
    "SPACE_MAP_ROOT",
    "SUPERBLOCK",
    "Bitmap",
    "Details",
    "Field",
    "IndexEntry",
    "MappingValue",
    "MetadataIndex",
    "NodeHeader",
    "Record",
    "RefCount",
    "Salt",
    "SpaceMapRoot",
    "Superblock",
    "checksum",
    "kind_of",
    "sealed",
]
