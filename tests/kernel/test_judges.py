"""What judges cold stops is itself judged: lost, torn and wrong bytes are seen, legal ones not."""

from __future__ import annotations

import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from tests.kernel import journal, powercut
from tests.kernel.journal import Operation
from tests.kernel.powercut import Entry, Kind, PowerCutDisks, receive, survivors

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[PowerCutDisks]:
    for name in ("a", "b"):
        with (tmp_path / f"{name}.source").open("wb") as file:
            file.truncate(4 * MIB)
    sources = {name: tmp_path / f"{name}.source" for name in ("a", "b")}
    with PowerCutDisks(tmp_path, sources) as made:
        yield made


class Client:
    """One that speaks the protocol, for one disk."""

    def __init__(self, disks: PowerCutDisks, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(disks.socket))
        assert receive(self.socket, 18)[:16] == powercut.MAGIC
        export = name.encode()
        wish = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self.socket.sendall(
            struct.pack(">I", powercut.FIXED_NEWSTYLE | powercut.NO_ZEROES)
            + struct.pack(">QII", powercut.OPTION_MAGIC, powercut.OPTION_GO, len(wish))
            + wish
        )
        kind = None
        while kind != powercut.REPLY_ACK:
            _, _, kind, length = struct.unpack(">QIII", receive(self.socket, 20))
            assert kind in (powercut.REPLY_ACK, powercut.REPLY_INFO)
            receive(self.socket, length)

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"") -> bytes:
        head = struct.pack(">IHHQQI", powercut.REQUEST_MAGIC, 0, kind, 7, offset, length)
        self.socket.sendall(head + data)
        magic, error, cookie = struct.unpack(">IIQ", receive(self.socket, 16))
        assert (magic, error, cookie) == (powercut.REPLY_MAGIC, 0, 7)
        return receive(self.socket, length) if kind == powercut.READ else b""

    def write(self, offset: int, data: bytes) -> None:
        self.ask(powercut.WRITE, offset, len(data), data)

    def flush(self) -> None:
        self.ask(powercut.FLUSH)


@pytest.fixture
def clients(disks: PowerCutDisks) -> Iterator[dict[str, Client]]:
    found = {name: Client(disks, name) for name in ("a", "b")}
    yield found
    for client in found.values():
        client.socket.close()


def test_what_was_flushed_is_on_every_image_and_what_was_not_on_some(
    disks: PowerCutDisks, clients: dict[str, Client], tmp_path: Path, seed: int
) -> None:
    clients["a"].write(0, b"\1" * 8192)
    clients["a"].flush()
    assert clients["a"].ask(powercut.READ, 0, 8192) == b"\1" * 8192
    flushed = disks.position()
    clients["b"].write(0, b"\2" * 8192)
    with_second = {True: 0, False: 0}
    for number in range(30):
        images = disks.image(2 + 1, tmp_path / "images", random.Random(seed + number))
        assert images["a"].read_bytes() == b"\1" * 8192 + bytes(4 * MIB - 8192)
        second = images["b"].read_bytes()[:8192]
        assert second.rstrip(b"\0") == b"\2" * len(second.rstrip(b"\0"))
        assert len(second.rstrip(b"\0")) % 512 == 0
        with_second[any(second)] += 1
    assert all(with_second.values()), with_second
    images = disks.image(flushed, tmp_path / "images", random.Random(seed))
    assert not any(images["b"].read_bytes())


def test_zeroes_and_discards_are_lost_like_writes(
    disks: PowerCutDisks, clients: dict[str, Client], tmp_path: Path, seed: int
) -> None:
    clients["a"].write(0, b"\1" * 65536)
    clients["a"].flush()
    clients["a"].ask(powercut.ZERO, 0, 16384)
    clients["a"].ask(powercut.TRIM, 32768, 16384)
    after = disks.image(disks.position(), tmp_path / "after", None)["a"].read_bytes()
    assert after[:16384] == bytes(16384)
    assert after[16384:32768] == b"\1" * 16384
    assert after[32768:49152] == bytes(16384)
    zero = next(n for n, entry in enumerate(disks.log()) if entry.kind is Kind.ZERO)
    kept = set()
    for number in range(20):
        images = disks.image(zero + 1, tmp_path / "images", random.Random(seed + number))
        kept.add(images["a"].read_bytes()[:512] == b"\1" * 512)
    assert kept == {True, False}


def test_a_restart_keeps_what_the_image_holds_and_forgets_the_log(
    disks: PowerCutDisks, tmp_path: Path
) -> None:
    client = Client(disks, "a")
    client.write(0, b"\3" * 4096)
    client.flush()
    client.socket.close()
    images = disks.image(disks.position(), tmp_path / "images", None)
    disks.restart_from(images)
    assert disks.position() == 0
    client = Client(disks, "a")
    assert client.ask(powercut.READ, 0, 4096) == b"\3" * 4096
    client.socket.close()


def test_a_write_that_is_forced_survives_though_nothing_was_flushed(seed: int) -> None:
    entries = [
        Entry("a", Kind.WRITE, 0, 512, b"x" * 512, forced=True),
        Entry("a", Kind.WRITE, 512, 512, b"y" * 512),
    ]
    lost = 0
    for number in range(50):
        kept = list(survivors(entries, random.Random(seed + number)))
        assert (entries[0], 512) in kept
        lost += len(kept) == 1
    assert lost


def plan() -> tuple[journal.Files, list[Operation]]:
    files = {"a": b"a" * 100, "b": b"b" * 100}
    operations = [
        Operation("c", b"new", ""),
        Operation("a", b"a" * 50 + b"X" * 10 + b"a" * 40, "", written=(50, 60)),
        Operation("b", b"other", "", atomic=True, beside="tmp"),
        Operation("c", None, "", atomic=True),
    ]
    return files, operations


def judged(found: journal.Files, certain: int, possible: int) -> list[str]:
    files, operations = plan()
    return journal.problems(found, files, operations, certain=certain, possible=possible)


def test_every_state_that_was_gone_through_is_legal() -> None:
    files, operations = plan()
    for number in range(len(operations) + 1):
        found = journal.apply(files, operations[:number])
        for certain in range(number + 1):
            assert not judged(found, certain, max(number, certain))


def test_a_lost_file_and_a_lost_change_are_seen() -> None:
    files, operations = plan()
    assert judged(files, 1, 2) == ["c is gone"]
    done = journal.apply(files, operations[:2])
    assert judged({**done, "a": files["a"]}, 2, 3)[0].startswith("a is not what was fsynced")
    assert judged({**done, "c": b"ne"}, 2, 3)[0].startswith("c is not what was fsynced")
    assert judged(journal.apply(files, operations[:3]), 4, 4) == ["c should not be there"]


def test_a_change_in_flight_is_old_outside_of_what_it_writes() -> None:
    files, operations = plan()
    one = journal.apply(files, operations[:1])
    assert not judged({**one, "a": b"a" * 50 + b"XXXXX" + b"a" * 45}, 1, 2)
    assert judged({**one, "a": b"a" * 49 + b"X" * 11 + b"a" * 40}, 1, 2) == [
        "a changed at 49, where nothing was written"
    ]
    assert judged({**one, "a": b"a" * 50}, 1, 2) == ["a has 50 of 100 bytes"]


def test_a_file_that_is_cut_keeps_what_is_before_and_may_have_zeros_behind() -> None:
    files = {"a": b"a" * 10_000}
    operations = [Operation("a", b"a" * 5000, "", written=(5000, 8192))]

    def said(found: bytes) -> list[str]:
        return journal.problems({"a": found}, files, operations, certain=0, possible=1)

    for legal in (b"a" * 10_000, b"a" * 5000, b"a" * 5000 + bytes(3192) + b"a" * 1808):
        assert not said(legal)
    assert said(b"a" * 4999)
    assert said(b"a" * 4999 + bytes(3193) + b"a" * 1808)
    assert said(b"a" * 5000 + bytes(5000))


def test_a_replaced_file_is_the_old_or_the_new_one() -> None:
    files, operations = plan()
    two = journal.apply(files, operations[:2])
    assert not judged({**two, "tmp": b"oth"}, 2, 3)
    assert not judged({**two, "b": b"other"}, 2, 3)
    (said,) = judged({**two, "b": b"oth"}, 2, 3)
    assert said.startswith("b is neither the old nor a new one: ")
