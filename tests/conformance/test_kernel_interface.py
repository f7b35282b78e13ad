"""What only the kernel has: tables, reloads, suspending; through the device-mapper client."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conformance.driver import BLOCK, MD, SECTOR, judge, pattern
from thinpool import errors
from thinpool.dm import (
    DeviceMapper,
    DiscardPolicy,
    LinearTarget,
    OtherTarget,
    ThinPool,
    ThinPoolMode,
    ThinPoolTarget,
    ThinTarget,
)
from thinpool.engine import BlockDevice
from thinpool.host import loop

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.dm, pytest.mark.timeout(120)]

BLKDISCARD = 0x1277
SECTORS = BLOCK // SECTOR
REFUSED = (errors.DeviceMapperError, errors.UsageError, errors.BusyError)


class Raw:
    """Loop devices over files, and dm devices by names of this test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mapper = DeviceMapper()
        self.loops: list[loop.LoopDevice] = []
        self.names: list[str] = []

    def file(self, name: str, size: int, *, read_only: bool = False) -> str:
        """A loop device over a new file of zeros, or over one that is there."""
        path = self.folder / name
        if not path.exists():
            BlockDevice.open_file(path, create_size=size).close()
        device = loop.attach(str(path), direct_io=False, read_only=read_only)
        self.loops.append(device)
        return device.path

    def make(self, name: str, *targets) -> str:
        """A live device; its node."""
        full = f"tpt-{os.getpid()}-{name}"
        self.names.append(full)
        return self.mapper.activate(full, list(targets)).path

    def name(self, name: str) -> str:
        return f"tpt-{os.getpid()}-{name}"

    def pool_target(self, blocks: int = 32, **settings) -> ThinPoolTarget:
        return ThinPoolTarget(
            length=blocks * SECTORS,
            metadata=self.metadata,
            data=self.data,
            block_sectors=SECTORS,
            **settings,
        )

    def pool(self, blocks: int = 32, **settings) -> ThinPool:
        """A pool that the kernel formats itself."""
        self.metadata = self.file("metadata", 256 * MD)
        self.data = self.file("data", blocks * BLOCK)
        self.node = self.make("pool", self.pool_target(blocks, **settings))
        return ThinPool(self.mapper, self.name("pool"))

    def thin(self, thin_id: int, blocks: int = 16) -> str:
        return self.make(
            f"thin{thin_id}", ThinTarget(length=blocks * SECTORS, pool=self.node, id=thin_id)
        )

    def remove(self, name: str) -> None:
        self.names.remove(self.name(name))
        self.mapper.remove(self.name(name))

    def finish(self) -> None:
        for name in self.names:
            with contextlib.suppress(errors.ThinpoolError):
                if self.mapper.info(name).suspended:
                    self.mapper.resume(name)
        for name in reversed(self.names):
            self.mapper.remove(name)
        self.mapper.close()
        for device in reversed(self.loops):
            loop.detach(device)
        if (self.folder / "metadata").exists():
            image = (self.folder / "metadata").read_bytes()
            if any(image[:MD]):
                judge(image)


@pytest.fixture
def raw(tmp_path: Path) -> Iterator[Raw]:
    found = Raw(tmp_path)
    yield found
    found.finish()


def write(node: str, block: int, data: bytes) -> None:
    with BlockDevice.open_file(node, direct=True) as device:
        device.write(block * BLOCK, data)


def read(node: str, block: int, length: int = BLOCK) -> bytes:
    with BlockDevice.open_file(node, read_only=True, direct=True) as device:
        return device.read(block * BLOCK, length)


def discard(node: str, sector: int, sectors: int) -> None:
    descriptor = os.open(node, os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, BLKDISCARD, struct.pack("=QQ", sector * SECTOR, sectors * SECTOR))
    finally:
        os.close(descriptor)


# ---- pools ----------------------------------------------------------------------------------


def test_a_pool_that_the_kernel_formats_is_as_ours(raw):
    pool = raw.pool()
    status = pool.status()
    assert (status.transaction_id, status.held_root, status.mode) == (0, None, ThinPoolMode.RW)
    assert (status.used_data_blocks, status.total_data_blocks) == (0, 32)
    pool.create_thin(0)
    node = raw.thin(0)
    write(node, 3, pattern(3))
    assert read(node, 3) == pattern(3)
    assert read(node, 2) == bytes(BLOCK)


@pytest.mark.parametrize(
    ("block", "why"), [(64, "too small"), (200, "no multiple"), (2_097_280, "too large")]
)
def test_block_sizes_that_the_kernel_refuses(raw, block, why):
    metadata, data = raw.file("m", 256 * MD), raw.file("d", 32 * BLOCK)
    words = (metadata, data, str(block), "0")
    with pytest.raises(errors.DeviceMapperError):
        raw.make("bad", OtherTarget(length=4096, type_name="thin-pool", words=words))
    raw.names.clear()


def test_a_metadata_device_that_is_too_small_is_refused_by_the_kernel(raw):
    raw.metadata, raw.data = raw.file("m", MD), raw.file("d", 32 * BLOCK)
    with pytest.raises(errors.ThinpoolError):
        raw.make("bad", raw.pool_target())
    raw.names.clear()


def test_ids_at_the_limit(raw):
    pool = raw.pool()
    pool.create_thin((1 << 24) - 1)
    raw.thin((1 << 24) - 1)
    with pytest.raises(errors.DeviceMapperError):
        raw.mapper.message(pool.name, f"create_thin {1 << 24}")
    words = (raw.node, str(1 << 24))
    with pytest.raises(errors.ThinpoolError):
        raw.make("bad", OtherTarget(length=SECTORS, type_name="thin", words=words))
    raw.names.remove(raw.name("bad"))


def test_activating_a_volume_of_a_suspended_pool_fails(raw):
    pool = raw.pool()
    pool.create_thin(0)
    with raw.mapper.suspended(pool.name):
        with pytest.raises(errors.ThinpoolError):
            raw.thin(0)
        raw.names.remove(raw.name("thin0"))
    raw.thin(0)


def test_an_unknown_volume_cannot_be_activated(raw):
    raw.pool()
    with pytest.raises(errors.NotFoundError):
        raw.thin(5)
    raw.names.remove(raw.name("thin5"))


def test_a_pool_can_take_the_place_of_linears(raw):
    raw.metadata, raw.data = raw.file("metadata", 256 * MD), raw.file("data", 32 * BLOCK)
    half = 16 * SECTORS
    other = raw.file("other", 32 * BLOCK)
    raw.node = raw.make("pool", LinearTarget(length=32 * SECTORS, device=other))
    name = raw.name("pool")
    raw.mapper.reload(
        name,
        [
            LinearTarget(length=half, device=other),
            LinearTarget(start=half, length=half, device=other, offset=half),
        ],
    )
    raw.mapper.reload(name, [raw.pool_target()])
    pool = ThinPool(raw.mapper, name)
    pool.create_thin(0)
    write(raw.thin(0), 0, pattern(1))


def test_nothing_else_takes_the_place_of_a_pool(raw):
    pool = raw.pool()
    other_metadata, other = raw.file("m2", 256 * MD), raw.file("d2", 64 * BLOCK)
    length = 32 * SECTORS
    linear = LinearTarget(length=length, device=other)
    different = ThinPoolTarget(
        length=length, metadata=other_metadata, data=other, block_sectors=SECTORS
    )
    behind = LinearTarget(start=length, length=length, device=other)
    for table in ([linear], [different], [raw.pool_target(), behind]):
        with pytest.raises(REFUSED):
            raw.mapper.reload(pool.name, table)
        raw.mapper.clear(pool.name)
    raw.mapper.reload(pool.name, [raw.pool_target()])  # the same one does
    pool.create_thin(0)
    write(raw.thin(0), 0, pattern(1))


def test_a_pool_is_alone_in_its_table(raw):
    raw.metadata, raw.data = raw.file("m", 256 * MD), raw.file("d", 32 * BLOCK)
    linear = LinearTarget(start=32 * SECTORS, length=SECTORS, device=raw.data)
    with pytest.raises(REFUSED):
        raw.make("bad", raw.pool_target(), linear)
    raw.names.clear()


def test_ignoring_discards_cannot_change_with_a_reload(raw):
    pool = raw.pool()
    with pytest.raises(REFUSED):
        raw.mapper.reload(pool.name, [raw.pool_target(ignore_discard=True)])
    raw.mapper.clear(pool.name)
    assert pool.status().discard is DiscardPolicy.PASSDOWN


def test_a_reload_with_less_data_is_refused_and_the_pool_goes_on(raw):
    pool = raw.pool()
    pool.create_thin(0)
    node = raw.thin(0)
    write(node, 0, pattern(1))
    with pytest.raises(REFUSED):
        raw.mapper.reload(pool.name, [raw.pool_target(blocks=16)])
    assert pool.status().total_data_blocks == 32
    write(node, 1, pattern(2))
    assert read(node, 0) == pattern(1)


def test_more_data_is_used_after_a_reload_that_asks_for_it_only(raw):
    pool = raw.pool(blocks=8)
    os.truncate(raw.folder / "data", 32 * BLOCK)
    loop.set_capacity(raw.data)
    with raw.mapper.suspended(pool.name):
        pass
    raw.mapper.reload(pool.name, [raw.pool_target(blocks=8)])
    assert pool.status().total_data_blocks == 8
    raw.mapper.reload(pool.name, [raw.pool_target(blocks=32)])
    assert pool.status().total_data_blocks == 32


def test_two_pools_on_one_metadata_device_are_refused_by_the_kernel(raw):
    raw.pool()
    data = raw.file("d2", 32 * BLOCK)
    target = ThinPoolTarget(
        length=32 * SECTORS, metadata=raw.metadata, data=data, block_sectors=SECTORS
    )
    with pytest.raises(errors.BusyError):
        raw.make("second", target)
    raw.names.remove(raw.name("second"))


def test_a_read_only_pool_on_a_read_only_metadata_device(raw):
    pool = raw.pool()
    pool.create_thin(0)
    write(raw.thin(0), 0, pattern(1))
    raw.remove("thin0")
    raw.remove("pool")
    loop.detach(raw.loops.pop(0))
    raw.metadata = raw.file("metadata", 0, read_only=True)
    raw.node = raw.make("pool", raw.pool_target(read_only=True))
    assert pool.status().mode is ThinPoolMode.RO
    node = raw.thin(0)
    assert read(node, 0) == pattern(1)
    assert read(node, 1) == bytes(BLOCK)
    write(node, 0, pattern(2))  # what is mapped needs no metadata
    with pytest.raises(errors.ThinpoolError):
        write(node, 1, pattern(3))
    with pytest.raises(errors.ReadOnlyError):
        pool.create_thin(1)


# ---- messages -------------------------------------------------------------------------------


def test_messages_that_the_kernel_refuses(raw):
    pool = raw.pool()
    pool.create_thin(0)
    raw.thin(0)
    with pytest.raises(errors.AlreadyExistsError):
        pool.create_thin(0)
    with pytest.raises(errors.NotFoundError):
        pool.create_snap(1, origin=9)
    with pytest.raises(errors.NotFoundError):
        pool.delete(9)
    with pytest.raises(errors.BusyError):
        pool.delete(0)
    for text in ("create_thin", "create_thin x", "set_transaction_id 1", "no_such_message"):
        with pytest.raises(errors.DeviceMapperError):
            raw.mapper.message(pool.name, text)
    assert pool.status().transaction_id == 0


def test_the_transaction_id_is_compared_and_set(raw):
    pool = raw.pool()
    pool.set_transaction_id(0, 5)
    with pytest.raises(errors.TransactionIdError):
        pool.set_transaction_id(4, 6)
    with pytest.raises(errors.TransactionIdError):
        pool.set_transaction_id(6, 7)
    assert pool.status().transaction_id == 5


def test_messages_are_taken_while_the_pool_is_suspended(raw):
    pool = raw.pool()
    with raw.mapper.suspended(pool.name):
        pool.create_thin(0)
    raw.thin(0)


# ---- suspending -----------------------------------------------------------------------------


@pytest.mark.parametrize("thins", ["none", "inactive", "active", "suspended", "written"])
def test_a_pool_is_suspended_and_resumed(raw, thins):
    pool = raw.pool()
    node = None
    if thins != "none":
        pool.create_thin(0)
    if thins in {"active", "suspended", "written"}:
        node = raw.thin(0)
    if thins == "written":
        write(node, 0, pattern(1))
    if thins == "suspended":
        raw.mapper.suspend(raw.name("thin0"))
    with raw.mapper.suspended(pool.name) as info:
        assert info.suspended
    if thins == "suspended":
        raw.mapper.resume(raw.name("thin0"))
    if node is not None:
        write(node, 1, pattern(2))
        assert read(node, 1) == pattern(2)


def test_resuming_a_volume_waits_for_its_suspended_pool(raw):
    """Which is no deadlock: it goes on with the pool."""
    pool = raw.pool()
    pool.create_thin(0)
    node = raw.thin(0)
    raw.mapper.suspend(raw.name("thin0"))
    raw.mapper.suspend(pool.name)
    with DeviceMapper() as other:
        waiter = threading.Thread(target=other.resume, args=(raw.name("thin0"),), daemon=True)
        waiter.start()
        waiter.join(0.5)
        waited = waiter.is_alive()
        raw.mapper.resume(pool.name)
        waiter.join(60)
        assert not waiter.is_alive()
    assert waited
    write(node, 0, pattern(1))
    assert read(node, 0) == pattern(1)


def test_writes_wait_for_a_suspended_pool(raw):
    pool = raw.pool()
    pool.create_thin(0)
    node = raw.thin(0)
    raw.mapper.suspend(pool.name)
    writer = threading.Thread(target=write, args=(node, 0, pattern(1)), daemon=True)
    writer.start()
    writer.join(0.5)
    waited = writer.is_alive()
    raw.mapper.resume(pool.name)
    writer.join(60)
    assert not writer.is_alive()
    assert waited
    assert read(node, 0) == pattern(1)


def test_suspending_twice_at_once_is_once(raw):
    pool = raw.pool()
    pool.create_thin(0)
    raw.thin(0)
    threads = [threading.Thread(target=raw.mapper.suspend, args=(pool.name,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert raw.mapper.info(pool.name).suspended
    raw.mapper.resume(pool.name)
    assert not raw.mapper.info(pool.name).suspended


def test_suspended_under_io_nothing_is_lost(raw):
    pool = raw.pool(blocks=32)
    pool.create_thin(0)
    node = raw.thin(0)
    done = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        number = 0
        try:
            with BlockDevice.open_file(node, direct=True) as device:
                while not done.is_set():
                    number += 1
                    device.write(number % 16 * BLOCK, pattern(number))
                    assert device.read(number % 16 * BLOCK, BLOCK) == pattern(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        for _ in range(5):
            with raw.mapper.suspended(pool.name):
                pass
            # Volume first: suspending one of a suspended pool waits for the pool.
            with raw.mapper.suspended(raw.name("thin0")), raw.mapper.suspended(pool.name):
                pass
    finally:
        done.set()
        worker.join(60)
    assert not worker.is_alive()
    assert not failed


# ---- discards -------------------------------------------------------------------------------


def test_partial_discards_through_the_block_layer_are_ignored(raw):
    pool = raw.pool()
    pool.create_thin(0)
    node = raw.thin(0)
    for block in range(4):
        write(node, block, pattern(block))
    discard(node, 1, SECTORS)  # no whole block in it
    assert pool.status(noflush=False).used_data_blocks == 4
    discard(node, SECTORS - 8, 2 * SECTORS + 16)
    assert pool.status(noflush=False).used_data_blocks == 2
    assert [read(node, block) for block in (0, 3)] == [pattern(0), pattern(3)]


def test_a_discard_past_the_end_is_refused(raw):
    pool = raw.pool()
    pool.create_thin(0)
    node = raw.thin(0)
    with pytest.raises(OSError, match="Invalid argument"):
        discard(node, 15 * SECTORS, 2 * SECTORS)


def test_the_granularity_of_discards_is_a_block(raw):
    pool = raw.pool()
    pool.create_thin(0)
    number = Path(raw.thin(0)).stat().st_rdev
    queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue")
    assert int((queue / "discard_granularity").read_text()) == BLOCK
    assert int((queue / "discard_max_bytes").read_text()) >= BLOCK


def test_volumes_of_a_pool_that_ignores_discards_take_none(raw):
    pool = raw.pool(ignore_discard=True)
    assert pool.status().discard is DiscardPolicy.IGNORE
    pool.create_thin(0)
    node = raw.thin(0)
    write(node, 0, pattern(0))
    with pytest.raises(OSError, match="not supported"):
        discard(node, 0, SECTORS)
    assert pool.status(noflush=False).used_data_blocks == 1


@pytest.mark.parametrize("passdown", [True, False])
def test_discards_unmap_over_a_device_that_takes_none(raw, passdown):
    subprocess.run(["modprobe", "brd", "rd_nr=1", "rd_size=4096"], check=True)
    queue = Path("/sys/block/ram0/queue/discard_max_bytes")
    assert int(queue.read_text()) == 0, "this kernel's ram disk takes discards"
    raw.metadata, raw.data = raw.file("metadata", 256 * MD), "/dev/ram0"
    raw.node = raw.make("pool", raw.pool_target(no_discard_passdown=not passdown))
    pool = ThinPool(raw.mapper, raw.name("pool"))
    assert pool.status().discard is DiscardPolicy.NO_PASSDOWN
    pool.create_thin(0)
    node = raw.thin(0)
    write(node, 0, pattern(0))
    discard(node, 0, SECTORS)
    assert pool.status(noflush=False).used_data_blocks == 0
    assert read(node, 0) == bytes(BLOCK)


# ---- stacks ---------------------------------------------------------------------------------


POLICIES = {
    "both": {},
    "discard": {"no_discard_passdown": True},
    "none": {"ignore_discard": True},
}


@pytest.mark.parametrize(
    ("lower_policy", "upper_policy"),
    [
        ("both", "both"), ("none", "both"), ("both", "none"), ("none", "none"),
        ("both", "discard"), ("discard", "both"),
    ],
)  # fmt: skip
def test_a_pool_on_a_volume_of_another_pool(raw, lower_policy, upper_policy):
    """A discard goes down as far as each pool lets it."""
    lower = raw.pool(**POLICIES[lower_policy])
    lower.create_thin(0)
    data = raw.thin(0, blocks=16)
    target = ThinPoolTarget(
        length=16 * SECTORS, metadata=raw.file("m2", 256 * MD), data=data, block_sectors=SECTORS,
        **POLICIES[upper_policy],
    )  # fmt: skip
    node = raw.make("upper", target)
    upper = ThinPool(raw.mapper, raw.name("upper"))
    upper.create_thin(7)
    top = raw.make("top", ThinTarget(length=16 * SECTORS, pool=node, id=7))
    write(top, 3, pattern(3))
    assert read(top, 3) == pattern(3)
    assert lower.status(noflush=False).used_data_blocks == 1
    if upper_policy == "none":
        with pytest.raises(OSError, match="not supported"):
            discard(top, 3 * SECTORS, SECTORS)
    else:
        discard(top, 3 * SECTORS, SECTORS)
    left_above = 1 if upper_policy == "none" else 0
    assert upper.status(noflush=False).used_data_blocks == left_above
    passed = upper_policy == "both" and lower_policy != "none"
    assert lower.status(noflush=False).used_data_blocks == (0 if passed else 1)


def test_stripes_below_a_pool_and_linears_above_a_volume(raw):
    one, two = raw.file("s1", 16 * BLOCK), raw.file("s2", 16 * BLOCK)
    raw.metadata = raw.file("metadata", 256 * MD)
    raw.data = raw.make(
        "stripes",
        OtherTarget(
            length=32 * SECTORS, type_name="striped", words=("2", "128", one, "0", two, "0")
        ),
    )
    raw.node = raw.make("pool", raw.pool_target())
    pool = ThinPool(raw.mapper, raw.name("pool"))
    pool.create_thin(0)
    thin = raw.thin(0)
    linear = raw.make("linear", LinearTarget(length=8 * SECTORS, device=thin, offset=4 * SECTORS))
    for block in range(8):
        write(linear, block, pattern(block))
    assert [read(thin, block + 4) for block in range(8)] == [pattern(b) for b in range(8)]


# ---- tools beside a live pool ---------------------------------------------------------------


def test_tools_refuse_live_metadata_but_not_its_snapshot(raw):
    pool = raw.pool()
    pool.create_thin(0)
    write(raw.thin(0), 0, pattern(0))
    refused = subprocess.run(["thin_check", raw.metadata], capture_output=True, check=False)
    assert refused.returncode != 0
    root = pool.reserve_metadata_snap()
    pool.create_thin(1)
    dump = subprocess.run(
        ["thin_dump", f"--metadata-snap={root}", raw.metadata],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert 'dev_id="0"' in dump
    assert 'dev_id="1"' not in dump
    pool.release_metadata_snap()
