"""What works without root and without FUSE: run as an ordinary user, ``SCRIPT ROOT``."""

import io
import json
import os
import random
import sys
from pathlib import Path

from thinpool import Thinpool, errors

MIB = 1 << 20


def main() -> None:
    root = Path(sys.argv[1])
    api = Thinpool(root, timeout=20)
    status = api.create_pool("p", size=256 * MIB, base_size=64 * MIB)
    assert (status.mode, status.volumes, status.engine) == ("rw", 1, "user")
    (base,) = api.list("p")
    assert (base.name, base.kind, base.filesystem, base.read_only) == ("base", "base", "ext4", True)
    with api.open("p/base") as handle:
        assert handle.read(1080, 2) == b"\x53\xef"

    api.create("p/db", size=32 * MIB)
    rng = random.Random(5)
    model = bytearray(32 * MIB)
    with api.open("p/db", writable=True) as handle:
        for _ in range(60):
            offset = rng.randrange(32 * MIB - 200_000)
            data = rng.randbytes(rng.randrange(1, 200_000))
            handle.write(offset, data)
            model[offset : offset + len(data)] = data
        handle.write(0, b"first")
        model[:5] = b"first"
        handle.zero(5 * MIB + 77, 3 * MIB)
        model[5 * MIB + 77 : 8 * MIB + 77] = bytes(3 * MIB)
        handle.flush()
        assert handle.read(0, 32 * MIB) == model
    frozen = bytes(model)

    snapshot = api.snapshot("p/db", "p/then")
    assert (snapshot.parent, snapshot.consistency, snapshot.kind) == ("db", "quiescent", "volume")
    with api.open("p/db", writable=True) as handle:
        handle.write(0, b"changed")
    with api.open("p/then") as handle:
        assert handle.read(0, 32 * MIB) == frozen
    delta = api.delta("p/then", "p/db")
    assert [(each.begin, each.length, each.change) for each in delta.ranges] == [
        (0, 65536, "different")
    ]

    outputs(api, root, frozen)
    refusals(api)
    xfs = api.create("p/x", size=400 * MIB, fs="xfs") if has_xfs() else None
    if xfs is not None:
        with api.open("p/x") as handle:
            assert handle.read(0, 4) == b"XFSB"
    removal = api.remove(["p/db", "p/then"])
    assert removal.freed > 4 * MIB
    assert api.check("p").clean
    api.remove_pool("p")
    assert api.pools() == []
    sys.stdout.write(json.dumps({"uid": os.getuid(), "done": True}))


def outputs(api: Thinpool, root: Path, frozen: bytes) -> None:
    """What is read from a pool."""
    report = api.check("p")
    assert report.clean, report
    text = io.BytesIO()
    api.dump("p", text)
    assert text.getvalue().count(b"<device ") == 3

    raw = root / "then.img"
    exported = api.export("p/then", raw, raw=True)
    assert exported.written > 0
    assert raw.read_bytes() == frozen
    assert raw.stat().st_blocks * 512 < 40 * MIB


def refusals(api: Thinpool) -> None:
    """What cannot be, each with its own type."""
    for operation, kind in (
        (lambda: api.activate("p/db"), errors.UnsupportedHostError),
        (lambda: api.create("p/db", size=MIB), errors.AlreadyExistsError),
        (lambda: api.open("p/base", writable=True), errors.ReadOnlyError),
        (lambda: api.status("q"), errors.NotFoundError),
        (
            lambda: api.create_pool("q", size=MIB, engine="dm"),
            (errors.UnsupportedHostError, errors.NotPermittedError),
        ),
    ):
        try:
            operation()
        except kind:
            continue
        raise AssertionError(kind)


def has_xfs() -> bool:
    return any(Path(directory, "mkfs.xfs").exists() for directory in ("/sbin", "/usr/sbin"))


if __name__ == "__main__":
    main()
