"""Altered images: each defect by its name, how it is made, and what is to be said of it.

The base is one device of 1000 mappings in 4 leaves, and a snapshot that shares its root. For each
defect stand what our check is to say (type and severity, all of it) and what thin_check 0.9 says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.check.builder import Builder, Image
from thinpool.format.limits import NEEDS_CHECK

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS: Final = 1000
UNJUDGED: Final = "note counts_unjudged"
FREE_DATA: Final = 1500
"""A data block that nothing maps."""
FREE_METADATA: Final = 900


@dataclass(frozen=True)
class Defect:
    """One altered image.

    Attributes:
        make: builds it.
        says: what our check says, as "severity type".
        thin_check: whether thin_check 0.9 accepts it.
    """

    make: Callable[[], Image]
    says: frozenset[str]
    thin_check: bool


DEFECTS: dict[str, Defect] = {}


def defect(*says: str, thin_check: bool) -> Callable[[Callable[[], Image]], Callable[[], Image]]:
    """Register a function by its name."""

    def register(make: Callable[[], Image]) -> Callable[[], Image]:
        DEFECTS[make.__name__] = Defect(make, frozenset(says), thin_check)
        return make

    return register


# ---- bases ----------------------------------------------------------------------------------


def mappings(count: int = BLOCKS, first: int = 0) -> dict[int, tuple[int, int]]:
    return {block: (block, 0) for block in range(first, first + count)}


def base() -> Image:
    builder = Builder()
    root = builder.tree(mappings())
    return builder.device(1, root).device(2, root).finish()


def root_of(image: Image) -> int:
    """Of both devices' tree."""
    return image.value(image.facts.data_mapping_root, 0)


def leaf_of(image: Image, index: int) -> int:
    return image.value(root_of(image), index)


def of_leaves(*lengths: int) -> Image:
    """Devices whose leaves have these lengths."""
    builder = Builder()
    children = []
    first = 0
    for length in lengths:
        children.append((first, builder.leaf(mappings(length, first))))
        first += max(length, 1)
    root = builder.internal(children)
    return builder.device(1, root).device(2, root).finish()


def of_root(root_leaf: dict[int, tuple[int, int]], max_entries: int | None = None) -> Image:
    builder = Builder()
    root = builder.leaf(root_leaf, max_entries=max_entries)
    return builder.device(1, root).device(2, root).finish()


# ---- superblock -----------------------------------------------------------------------------


@defect(thin_check=True)
def good() -> Image:
    return base()


@defect("fatal version", thin_check=True)
def sb_version_0() -> Image:
    return base().superblock(version=0)


@defect("note version", thin_check=True)
def sb_version_1() -> Image:
    return base().superblock(version=1)


@defect("fatal version", thin_check=True)
def sb_version_3() -> Image:
    return base().superblock(version=3)


@defect("fatal version", thin_check=True)
def sb_version_99() -> Image:
    return base().superblock(version=99)


@defect("fatal block_number", thin_check=True)
def sb_blocknr_5() -> Image:
    return base().superblock(blocknr=5)


@defect("fatal magic", thin_check=True)
def sb_magic_bad() -> Image:
    return base().superblock(magic=1)


@defect("fatal checksum", thin_check=False)
def sb_csum_bad() -> Image:
    return base().break_checksum(0)


@defect("note metadata_block_size", thin_check=True)
def sb_mdblocksize_16() -> Image:
    return base().superblock(metadata_block_size=16)


@defect(thin_check=True)
def sb_md_nr_blocks_500() -> Image:
    return base().superblock(metadata_nr_blocks=500)


@defect(thin_check=True)
def sb_md_nr_blocks_5000() -> Image:
    return base().superblock(metadata_nr_blocks=5000)


@defect("note features", thin_check=True)
def sb_compat_1() -> Image:
    return base().superblock(compat_flags=1)


@defect("fatal features", thin_check=True)
def sb_compat_ro_1() -> Image:
    return base().superblock(compat_ro_flags=1)


@defect("fatal features", thin_check=True)
def sb_incompat_1() -> Image:
    return base().superblock(incompat_flags=1)


@defect("note needs_check", thin_check=True)
def sb_needs_check() -> Image:
    return base().superblock(flags=NEEDS_CHECK)


@defect("note flags", thin_check=True)
def sb_flag_bit1() -> Image:
    return base().superblock(flags=2)


@defect(thin_check=True)
def sb_uuid() -> Image:
    return base().superblock(uuid=b"0123456789abcdef")


@defect(thin_check=True)
def sb_tail_garbage() -> Image:
    return base().poke(0, 0x800, b"\xa5" * 100)


@defect(thin_check=True)
def sb_dbs_256() -> Image:
    # Legal by itself; that the table says otherwise is not in the metadata.
    return base().superblock(data_block_size=256)


@defect("fatal data_block_size", thin_check=True)
def sb_dbs_100() -> Image:
    return base().superblock(data_block_size=100)


@defect("note details_time", thin_check=True)
def sb_time_zero() -> Image:
    return base().superblock(time=0)


@defect("fatal pool_time", thin_check=True)
def sb_time_past_24_bits() -> Image:
    return base().superblock(time=1 << 24)


@defect(thin_check=True)
def sb_smroot_tail_garbage() -> Image:
    return base().superblock(data_space_map_rest=b"\xa5" * 96)


# ---- nodes ----------------------------------------------------------------------------------


@defect(thin_check=True)
def node_padding_nonzero() -> Image:
    image = base()
    return image.node(leaf_of(image, 1), padding=7)


@defect("fatal block_number", UNJUDGED, thin_check=False)
def node_blocknr_bad() -> Image:
    image = base()
    return image.node(leaf_of(image, 1), blocknr=777)


@defect("fatal checksum", UNJUDGED, thin_check=False)
def node_csum_bad() -> Image:
    image = base()
    return image.break_checksum(leaf_of(image, 1))


@defect("fatal node_flags", UNJUDGED, thin_check=False)
def node_flags_3() -> Image:
    image = base()
    return image.node(leaf_of(image, 1), flags=3)


@defect("note node_flags", thin_check=True)
def node_flags_6() -> Image:
    image = base()
    return image.node(leaf_of(image, 1), flags=6)


@defect("fatal node_flags", UNJUDGED, thin_check=False)
def node_flags_0() -> Image:
    image = base()
    return image.node(leaf_of(image, 1), flags=0)


@defect(thin_check=True)
def node_unused_slots_garbage() -> Image:
    image = base()
    leaf = leaf_of(image, 1)
    return image.poke(leaf, 32 + 8 * 251, b"\xa5" * 8).poke(leaf, 4064, b"\xa5" * 32)


@defect("fatal keys_out_of_order", thin_check=False)
def keys_out_of_order() -> Image:
    image = base()
    leaf = leaf_of(image, 1)
    first, second = image.key(leaf, 10), image.key(leaf, 11)
    image.key(leaf, 10, second)
    image.key(leaf, 11, first)
    return image


@defect("fatal keys_duplicate", thin_check=False)
def keys_duplicate() -> Image:
    image = base()
    leaf = leaf_of(image, 1)
    image.key(leaf, 11, image.key(leaf, 10))
    return image


@defect(thin_check=True)
def parent_key_lower() -> Image:
    builder = Builder()
    low, high = mappings(200), mappings(200, 300)
    children = [(0, builder.leaf(low)), (250, builder.leaf(high))]
    root = builder.internal(children)
    return builder.device(1, root).device(2, root).finish()


@defect("fatal separator_high", thin_check=False)
def parent_key_higher() -> Image:
    image = base()
    image.key(root_of(image), 2, image.key(root_of(image), 2) + 3)
    return image


@defect("fatal separator_high", thin_check=False)
def parent_key0_higher() -> Image:
    image = base()
    image.key(root_of(image), 0, 3)
    return image


@defect("fatal separator_overlap", thin_check=True)
def parent_key_too_low_overlap() -> Image:
    image = base()
    image.key(root_of(image), 2, image.key(root_of(image), 2) - 3)
    return image


@defect("fatal node_underfull", thin_check=False)
def leaf_83() -> Image:
    return of_leaves(200, 83, 200)


@defect(thin_check=True)
def leaf_84() -> Image:
    return of_leaves(200, 84, 200)


@defect("fatal node_underfull", thin_check=False)
def leaf_last_1() -> Image:
    return of_leaves(200, 200, 1)


@defect(thin_check=True)
def leaf_root_1() -> Image:
    return of_root(mappings(1))


@defect("fatal node_underfull", thin_check=False)
def leaf_empty_middle() -> Image:
    return of_leaves(200, 0, 200)


@defect(thin_check=True)
def leaf_full_252() -> Image:
    return of_leaves(252, 252, 252)


@defect("fatal node_max_entries", thin_check=False)
def max_251() -> Image:
    image = base()
    return image.room(leaf_of(image, 1), 251)


@defect("fatal node_max_entries", thin_check=False)
def max_254() -> Image:
    image = base()
    return image.room(leaf_of(image, 1), 254)


@defect("fatal node_size", UNJUDGED, thin_check=False)
def max_255() -> Image:
    image = base()
    return image.node(leaf_of(image, 1), max_entries=255)


@defect("note node_max_entries", thin_check=True)
def max_126() -> Image:
    return of_root(mappings(100), max_entries=126)


@defect("note node_max_entries", "fatal node_max_entries", thin_check=True)
def max_126_unlike_siblings() -> Image:
    builder = Builder()
    children = [
        (0, builder.leaf(mappings(100), max_entries=126)),
        (100, builder.leaf(mappings(200, 100))),
    ]
    root = builder.internal(children)
    return builder.device(1, root).device(2, root).finish()


@defect("note node_max_entries", thin_check=True)
def max_3_root() -> Image:
    return of_root(mappings(3), max_entries=3)


@defect(thin_check=True)
def internal_root_1_child() -> Image:
    return of_leaves(200)


@defect("fatal node_empty", "note counts_unjudged", thin_check=False)
def internal_root_empty() -> Image:
    image = base()
    return image.node(root_of(image), nr_entries=0)


@defect("fatal node_underfull", thin_check=False)
def internal_underfull() -> Image:
    builder = Builder()
    parts = [(first, builder.leaf(mappings(200, first))) for first in range(0, 800, 200)]
    halves = [(0, builder.internal(parts[:2])), (400, builder.internal(parts[2:]))]
    root = builder.internal(halves)
    return builder.device(1, root).device(2, root).finish()


@defect("fatal unequal_depth", thin_check=True)
def unbalanced() -> Image:
    builder = Builder(data_blocks=20000)
    leaves = [(first, builder.leaf(mappings(84, first))) for first in range(0, 84 * 84, 84)]
    lone = builder.leaf(mappings(100, 10000))
    root = builder.internal([(0, builder.internal(leaves)), (10000, lone)])
    return builder.device(1, root).device(2, root).finish()


@defect("fatal node_value_size", UNJUDGED, thin_check=False)
def internal_value_size_4() -> Image:
    image = base()
    return image.node(root_of(image), value_size=4)


@defect("fatal node_value_size", UNJUDGED, thin_check=False)
def leaf_value_size_16() -> Image:
    image = base()
    # 168 entries of 16 bytes would fit: it is the size that is wrong, not the room.
    return image.node(leaf_of(image, 1), value_size=16, max_entries=168, nr_entries=100)


# ---- devices and mappings -------------------------------------------------------------------


@defect("fatal details_missing", thin_check=True)
def details_missing_dev1() -> Image:
    image = base()
    return image.drop_entry(image.facts.device_details_root, 0)


@defect("fatal mappings_missing", "leak count_high", thin_check=False)
def mapping_missing_dev1() -> Image:
    image = base()
    return image.drop_entry(image.facts.data_mapping_root, 0)


@defect("fatal mappings_missing", thin_check=True)
def mapping_missing_dev1_counts_right() -> Image:
    image = base()
    root = root_of(image)
    return image.drop_entry(image.facts.data_mapping_root, 0).pair("metadata", root, 1)


@defect("fatal mapped_blocks", thin_check=True)
def mapped_blocks_wrong() -> Image:
    return base().details(0, mapped_blocks=999)


def _renamed(number: int) -> Image:
    image = base()
    image.key(image.facts.data_mapping_root, 1, number)
    image.key(image.facts.device_details_root, 1, number)
    return image


@defect("fatal device_id", thin_check=True)
def dev_id_2p24() -> Image:
    return _renamed(1 << 24)


@defect("fatal device_id", thin_check=True)
def dev_id_2p32() -> Image:
    return _renamed(1 << 32)


@defect("fatal mapping_past_end", "leak count_high", thin_check=True)
def mapping_beyond_data() -> Image:
    image = base()
    image.value(leaf_of(image, 1), 5, 2048 << 24)
    return image


@defect("fatal mapping_time", thin_check=True)
def mapping_time_future() -> Image:
    image = base()
    leaf = leaf_of(image, 1)
    image.value(leaf, 5, image.value(leaf, 5) | 9)
    return image


@defect("note details_time", thin_check=True)
def details_time_future() -> Image:
    return base().details(0, snapshotted_time=9)


# ---- space maps -----------------------------------------------------------------------------


@defect("note index_beyond_end", thin_check=True)
def index_beyond_nonzero() -> Image:
    return base().index("metadata", 7, nr_free=5)


@defect(thin_check=True)
def index_padding_nonzero() -> Image:
    image = base()
    return image.poke(image.facts.metadata_space_map.bitmap_root, 4, b"\x07")


@defect(thin_check=True)
def bitmap_unused_nonzero() -> Image:
    image = base()
    return image.poke(image.bitmaps["data"][0], 4, b"\x07")


@defect("note bits_beyond_end", thin_check=True)
def md_bits_beyond_end() -> Image:
    return base().pair("metadata", 1100, 1)


@defect("note bits_beyond_end", thin_check=True)
def data_bits_beyond_end() -> Image:
    return base().pair("data", 3000, 1)


@defect("leak count_high", "note nr_allocated", "note nr_free", thin_check=False)
def md_leak_1() -> Image:
    return base().pair("metadata", FREE_METADATA, 1)


@defect("leak count_high", "note nr_allocated", "note nr_free", thin_check=False)
def md_leak_2() -> Image:
    return base().pair("metadata", FREE_METADATA, 2)


@defect("fatal count_low", thin_check=False)
def md_count_low() -> Image:
    image = base()
    return image.pair("metadata", root_of(image), 1)


@defect("leak count_high", "note nr_allocated", "note nr_free", thin_check=True)
def data_leak() -> Image:
    return base().pair("data", FREE_DATA, 1)


@defect(
    "fatal count_low",
    "note nr_allocated",
    "note nr_free",
    "fatal none_free_before",
    thin_check=True,
)
def data_count_low() -> Image:
    return base().pair("data", 5, 0)


@defect("leak count_high", thin_check=True)
def data_count_high() -> Image:
    return base().pair("data", 5, 2)


@defect("note nr_allocated", thin_check=True)
def md_nr_allocated_wrong() -> Image:
    image = base()
    return image.map_root("metadata", nr_allocated=image.facts.metadata_space_map.nr_allocated + 1)


@defect("note nr_allocated", thin_check=True)
def data_nr_allocated_wrong() -> Image:
    return base().map_root("data", nr_allocated=BLOCKS + 1)


@defect("fatal nr_allocated", thin_check=True)
def data_nr_allocated_all() -> Image:
    return base().map_root("data", nr_allocated=2048)


@defect("fatal nr_free", thin_check=True)
def md_nr_free_zero() -> Image:
    return base().index("metadata", 0, nr_free=0)


@defect("fatal none_free_before", thin_check=True)
def md_none_free_before_high() -> Image:
    return base().index("metadata", 0, none_free_before=1024)


@defect(thin_check=True)
def md_none_free_before_zero() -> Image:
    return base().index("metadata", 0, none_free_before=0)


@defect("fatal nr_free", thin_check=True)
def data_nr_free_zero() -> Image:
    return base().index("data", 0, nr_free=0)


@defect("fatal none_free_before", thin_check=True)
def data_none_free_before_high() -> Image:
    return base().index("data", 0, none_free_before=1001)


@defect("fatal overflow_extra", thin_check=True)
def overflow_extra_entry() -> Image:
    return base().overflow_entries("data", {5: 3})


@defect("fatal overflow_extra", thin_check=True)
def overflow_entry_past_end() -> Image:
    return base().overflow_entries("data", {5000: 3})


@defect("fatal overflow_missing", thin_check=True)
def overflow_missing() -> Image:
    image = thrice()
    return image.overflow_entries("data", {})


@defect("fatal overflow_small", thin_check=True)
def overflow_small() -> Image:
    return thrice().overflow_entries("data", {0: 2, 1: 3, 2: 3})


@defect("fatal count_low", thin_check=True)
def overflow_count_low() -> Image:
    image = Builder()
    roots = [image.leaf(mappings(3)) for _ in range(4)]
    for number, root in enumerate(roots):
        image.device(number, root)
    return image.finish().overflow_entries("data", {0: 4, 1: 3, 2: 4})


@defect("leak count_high", thin_check=True)
def overflow_count_high() -> Image:
    return thrice().overflow_entries("data", {0: 3, 1: 9, 2: 3})


@defect("note nr_free", thin_check=True)
def truncated_nr_free() -> Image:
    return base().index("data", 0, nr_free=2048 - BLOCKS)


def thrice() -> Image:
    """Three devices with leaves of their own that map the same three blocks."""
    builder = Builder()
    for number in range(3):
        builder.device(number, builder.leaf(mappings(3)))
    return builder.finish()


@defect(thin_check=True)
def overflow_good() -> Image:
    return thrice()


@defect("fatal index_missing", "leak count_high", thin_check=False)
def data_index_missing() -> Image:
    builder = Builder(data_blocks=40000)
    image = builder.device(1, builder.tree(mappings())).finish()
    return image.drop_entry(image.index_leaf, 2)


@defect("fatal index_extra", thin_check=True)
def data_index_extra() -> Image:
    builder = Builder(data_blocks=40000)
    image = builder.device(1, builder.tree(mappings())).finish()
    return image.map_root("data", nr_blocks=30000)


@defect("fatal checksum", thin_check=False)
def data_bitmap_csum_bad() -> Image:
    image = base()
    return image.break_checksum(image.bitmaps["data"][0])


@defect("fatal checksum", thin_check=False)
def md_index_csum_bad() -> Image:
    image = base()
    return image.break_checksum(image.facts.metadata_space_map.bitmap_root)


@defect("fatal space_map_size", "fatal index_missing", thin_check=True)
def data_nr_blocks_absurd() -> Image:
    image = base()
    return image.map_root("data", nr_blocks=1 << 50)


# ---- the device, metadata snapshots ---------------------------------------------------------


@defect(thin_check=True)
def file_longer() -> Image:
    image = base()
    image.data += bytes(64 * 4096)
    return image


@defect("fatal truncated_device", thin_check=True)
def file_shorter() -> Image:
    image = base()
    del image.data[800 * 4096 :]
    return image


@defect(thin_check=True)
def junk_in_free_blocks() -> Image:
    image = base()
    image.data[FREE_METADATA * 4096 : (FREE_METADATA + 1) * 4096] = b"\xa5" * 4096
    return image


@defect(thin_check=True)
def held_root_zeroed_sm() -> Image:
    return held()


def held() -> Image:
    """A metadata snapshot that still has what was deleted since, and shares the rest."""
    builder = Builder()
    root, gone = builder.tree(mappings()), builder.leaf(mappings(50, 1200))
    builder.device(1, root).device(2, root).device(3, gone).hold()
    return builder.without(3).device(4, builder.leaf(mappings(20, 1300))).finish()


@defect("fatal magic", thin_check=False)
def held_root_bad_block() -> Image:
    return base().superblock(held_root=FREE_METADATA)


@defect("fatal pointer_out_of_range", thin_check=False)
def held_root_past_end() -> Image:
    return base().superblock(held_root=1 << 40)


@defect("fatal checksum", UNJUDGED, thin_check=False)
def held_root_csum_bad() -> Image:
    image = held()
    return image.break_checksum(image.facts.held_root)


# ---- what nobody would write ----------------------------------------------------------------


@defect("fatal too_deep", "fatal count_low", UNJUDGED, thin_check=False)
def circle() -> Image:
    image = base()
    image.value(root_of(image), 1, root_of(image))
    return image


@defect("fatal block_reused", UNJUDGED, thin_check=False)
def pointer_to_superblock() -> Image:
    image = base()
    image.value(root_of(image), 1, 0)
    return image


@defect("fatal pointer_out_of_range", UNJUDGED, thin_check=False)
def pointer_out_of_range() -> Image:
    image = base()
    image.value(root_of(image), 1, 1 << 60)
    return image


@defect("fatal pointer_out_of_range", UNJUDGED, thin_check=False)
def mapping_root_out_of_range() -> Image:
    return base().superblock(data_mapping_root=1 << 33)


@defect("fatal block_reused", "fatal node_value_size", UNJUDGED, thin_check=False)
def details_root_is_a_mapping_leaf() -> Image:
    image = base()
    return image.superblock(device_details_root=leaf_of(image, 0))


@defect(
    "fatal block_reused",
    "fatal count_low",
    "leak count_high",
    "note nr_free",
    "fatal none_free_before",
    "note nr_allocated",
    thin_check=False,
)
def bitmap_in_both_maps() -> Image:
    image = base()
    return image.index("data", 0, blocknr=image.bitmaps["metadata"][0])
