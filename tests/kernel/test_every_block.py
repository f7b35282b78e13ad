"""Each side can use every block that the other one freed or added; time may stand at its end.

The kernel believes the hints of the space maps (how many entries are free, below which none is): a
wrong one hides free space for ever, and no checker looks at it. So small pools are filled to the
last block by one side, thinned out and grown by the other, and filled again.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.core.judges import our_check, thin_check
from tests.kernel import machine
from tests.kernel.trees import Script
from tests.kernel.world import BLOCK, MIB, SECTOR, quoted
from thinpool.engine import BlockDevice, Change, ChangeKind, Pool, PoolOptions, format_pool
from thinpool.errors import DataSpaceError, ThinpoolError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.root,
    pytest.mark.thin_tools,
    pytest.mark.kernel_vm,
    pytest.mark.xdist_group("kernel-vm"),
]
FIRST_BLOCKS = 150
GROWTH = 61
ROUNDS = 3
VOLUME_SIZE = 4096 * BLOCK
OPTIONS = PoolOptions(commit_interval_ms=0, error_if_no_space=True)
TIME_MOST = (1 << 24) - 1


@contextlib.contextmanager
def opened(metadata: Path, data: Path) -> Iterator[Pool]:
    with (
        BlockDevice.open_file(metadata) as metadata_device,
        BlockDevice.open_file(data) as data_device,
        Pool.open(metadata_device, data_device, OPTIONS) as pool,
    ):
        yield pool


def judge(metadata: Path) -> None:
    content = metadata.read_bytes()
    thin_check(content)
    report = our_check(content)
    assert not report.faults, report


def grow(data: Path, blocks: int) -> None:
    with data.open("r+b") as file:
        file.truncate(blocks * BLOCK)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    metadata, data = tmp_path / "metadata", tmp_path / "data"
    for path, size in ((metadata, 2 * MIB), (data, FIRST_BLOCKS * BLOCK)):
        with path.open("wb") as file:
            file.truncate(size)
    with BlockDevice.open_file(metadata) as device:
        format_pool(device, block_size=BLOCK, data_blocks=FIRST_BLOCKS)
    return metadata, data


def fill_here(pool: Pool) -> None:
    """Write to free blocks until there are none; every one can be had."""
    with pool.open_volume(VolumeId(1), size=VOLUME_SIZE) as volume:
        with contextlib.suppress(DataSpaceError):
            for block in range(VOLUME_SIZE // BLOCK):
                volume.write(block * BLOCK, bytes([block % 251 + 1]) * SECTOR)
        volume.flush()
    status = pool.status()
    assert status.data_blocks_used == status.data_blocks_total


def thin_out_here(pool: Pool, random_: random.Random) -> None:
    with pool.open_volume(VolumeId(1), size=VOLUME_SIZE) as volume:
        for block in random_.sample(range(FIRST_BLOCKS), 70):
            volume.discard(block * BLOCK, BLOCK)
        volume.flush()


def fill_there(script: Script, blocks: int) -> None:
    """The same in the guest: nothing is free afterwards."""
    script.lines += [
        "dd if=/dev/zero of=/dev/mapper/v bs=64K oflag=direct status=none 2>/dev/null && exit 1",
        "set -- $(dmsetup status $POOL)",
        f'[ "$6" = {blocks}/{blocks} ] || {{ dmsetup status; exit 1; }} >&2',
    ]


def test_every_block_that_one_side_frees_is_used_by_the_other(
    files: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    random_ = random.Random(seed)
    metadata, data = files
    blocks = FIRST_BLOCKS
    with opened(metadata, data) as pool:
        pool.apply([Change(kind=ChangeKind.CREATE, id=VolumeId(1))], expected=0, new=1)
    for _ in range(ROUNDS):
        blocks += GROWTH
        grow(data, blocks)
        with opened(metadata, data) as pool:
            pool.resize_data(blocks)
            fill_here(pool)
            thin_out_here(pool, random_)
        judge(metadata)
        script = Script(tmp_path)
        script.lines += [
            f". {quoted(machine.HERE / 'guest.sh')}",
            "pool_on error_if_no_space",
            quoted("thin_on", "v", 1, VOLUME_SIZE // SECTOR),
        ]
        fill_there(script, blocks)
        blocks += GROWTH
        for block in random_.sample(range(FIRST_BLOCKS), 60):
            script.lines.append(f"blkdiscard -o {block * BLOCK} -l {BLOCK} /dev/mapper/v")
        script.lines += ["dmsetup remove v", "pool_off"]
        # The kernel grows the pool as well: it takes the size of the device that it finds.
        script.lines += [
            "KR_DISK1=$KR_DISK2", "pool_on error_if_no_space",
            quoted("thin_on", "v", 1, VOLUME_SIZE // SECTOR),
        ]  # fmt: skip
        fill_there(script, blocks)
        for block in random_.sample(range(FIRST_BLOCKS), 50):
            script.lines.append(f"blkdiscard -o {block * BLOCK} -l {BLOCK} /dev/mapper/v")
        script.lines += ["dmsetup remove v", "pool_off"]
        job = tmp_path / "job.sh"
        job.write_text("\n".join(script.lines) + "\n")
        larger = tmp_path / "larger"  # what is in the blocks is none of this test's business
        with larger.open("wb") as file:
            file.truncate(blocks * BLOCK)
        machine.run(job, disks=[metadata, data, larger])
        judge(metadata)
        grow(data, blocks)
        with opened(metadata, data) as pool:
            assert pool.status().data_blocks_total == blocks
            fill_here(pool)
        judge(metadata)


def test_a_pool_at_the_last_time_works_on_both_sides(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The kernel would let time run into the block numbers; we stop before."""
    metadata, data = files
    xml = tmp_path / "last.xml"
    xml.write_text(
        f'<superblock uuid="" time="{TIME_MOST - 1}" transaction="5" flags="0" version="2" '
        f'data_block_size="128" nr_data_blocks="{FIRST_BLOCKS}">\n'
        f'  <device dev_id="1" mapped_blocks="2" transaction="0" creation_time="0" '
        f'snap_time="{TIME_MOST - 1}">\n'
        '    <range_mapping origin_begin="0" data_begin="0" length="2" time="3"/>\n'
        "  </device>\n</superblock>\n"
    )
    subprocess.run(["thin_restore", "-i", xml, "-o", metadata], check=True, capture_output=True)
    with data.open("r+b") as file:
        file.write(b"o" * (2 * BLOCK))
    with opened(metadata, data) as pool:
        last = Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(2), origin=VolumeId(1))
        pool.apply([last], expected=5, new=6)
        assert pool.status().time == TIME_MOST
        more = Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(3), origin=VolumeId(1))
        with pytest.raises(ThinpoolError):
            pool.apply([more], expected=6, new=7)
        with pool.open_volume(VolumeId(2), size=VOLUME_SIZE) as volume:
            volume.write(0, b"n" * SECTOR)
    script = tmp_path / "job.sh"
    script.write_text(
        f". {quoted(machine.HERE / 'guest.sh')}\npool_on\n"
        f"thins_on 'v1 1 {VOLUME_SIZE // SECTOR}' 'v2 2 {VOLUME_SIZE // SECTOR}'\n"
        "printf k | dd of=/dev/mapper/v1 conv=notrunc,fsync status=none\n"
        "printf k | dd of=/dev/mapper/v2 bs=64K seek=1 conv=notrunc,fsync status=none\n"
        "dmsetup remove v1 v2\npool_off\n"
    )
    machine.run(script, disks=[metadata, data])
    judge(metadata)
    with opened(metadata, data) as pool:
        with pool.open_volume(VolumeId(1), size=VOLUME_SIZE) as volume:
            assert volume.read(0, 2 * BLOCK) == b"k" + b"o" * (2 * BLOCK - 1)
        with pool.open_volume(VolumeId(2), size=VOLUME_SIZE) as volume:
            first = b"n" * SECTOR + b"o" * (BLOCK - SECTOR)
            assert volume.read(0, 2 * BLOCK) == first + b"k" + b"o" * (BLOCK - 1)
