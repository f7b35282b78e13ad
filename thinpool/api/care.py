"""Looking after pools: check, dump, doctor; also of those that cannot be opened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from thinpool import errors
from thinpool.host import capabilities
from thinpool.host.failures import failure
from thinpool.model import CheckReport, DoctorReport, Finding, Progress
from thinpool.store import poolfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from thinpool.api.session import Session

_UNOPENABLE = (
    errors.CorruptMetadataError,
    errors.NeedsCheckError,
    errors.PoolFailedError,
    errors.StorageIOError,
)
"""What keeps a server from opening a pool; its metadata is then read here."""


def check(
    session: Session,
    pool: str | None,
    *,
    metadata: Path | None,
    progress: Callable[[Progress], None] | None,
) -> CheckReport:
    """Check a pool or a bare metadata device."""
    if (pool is None) == (metadata is None):
        raise errors.UsageError("check takes a pool or --metadata, one of them", what="pool")
    if pool is None:
        return _check_file(str(metadata), None, progress)
    client = session.client(pool)
    try:
        answer = client.stream("check", progress=_reader(progress))
    except _UNOPENABLE as error:
        path = client.config().metadata
        if not Path(path).exists():
            raise errors.device_gone(pool, path) from error
        return _check_file(path, pool, progress)
    return CheckReport.from_json(answer)


def _reader(
    progress: Callable[[Progress], None] | None,
) -> Callable[[dict[str, object]], None] | None:
    if progress is None:
        return None
    return lambda document: progress(Progress.from_json(document))


def _check_file(
    path: str, pool: str | None, progress: Callable[[Progress], None] | None
) -> CheckReport:
    from thinpool.check import check_metadata  # noqa: PLC0415 - the C core, only here

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(
                Progress(operation="check", step="metadata", done=done, total=total, unit="blocks")
            )

    return check_metadata(path, pool=pool, progress=tell)


def dump(
    session: Session, pool: str | None, output: IO[bytes] | None, *, metadata: Path | None
) -> None:
    """Write metadata as XML."""
    if (pool is None) == (metadata is None):
        raise errors.UsageError("dump takes a pool or --metadata, one of them", what="pool")
    stream: IO[bytes] = output if output is not None else sys.stdout.buffer
    if pool is not None:
        session.client(pool).stream("dump", progress=None, chunk=lambda data: _write(stream, data))
    else:
        from thinpool.check import dump_metadata  # noqa: PLC0415 - the C core, only here

        for text in dump_metadata(str(metadata)):
            stream.write(text.encode())
    stream.flush()


def _write(stream: IO[bytes], data: bytes) -> None:
    stream.write(data)


def doctor(session: Session, pool: str | None) -> DoctorReport:
    """What this host can do, and what is wrong with pools."""
    names = [pool] if pool is not None else poolfile.list_pools(session.root)
    if pool is not None:
        poolfile.read_config(session.root, pool)
    return DoctorReport(
        host=host_findings(), pools={name: _pool_findings(session, name) for name in names}
    )


def _pool_findings(session: Session, name: str) -> tuple[Finding, ...]:
    try:
        found = session.client(name).call("doctor")
    except errors.ThinpoolError as error:
        return (
            Finding(
                subject=name, state="wrong", message=error.message, remedy=_remedy(name, error)
            ),
        )
    findings = tuple(Finding.from_json(each) for each in found)
    return findings or (Finding(subject=name, state="ok", message="pool and names agree"),)


def _remedy(name: str, error: errors.ThinpoolError) -> str | None:
    if isinstance(error, (errors.CorruptMetadataError, errors.NeedsCheckError)):
        return f"thinpool check {name}"
    if isinstance(error, errors.NotFoundError):
        return f"thinpool detach-pool {name}"
    return None


def host_findings() -> tuple[Finding, ...]:
    """What this host can do, a finding each."""
    found = []
    for name, probe in capabilities.PROBES.items():
        reason = probe()
        found.append(
            Finding(
                subject=name,
                state="ok" if reason is None else "missing",
                message=reason or "is there",
            )
        )
    return (*found, *_device_mapper_findings())


def _device_mapper_findings() -> Iterator[Finding]:
    """Whether the kernel engine can be used, and whether udev lets its devices alone."""
    from thinpool.dm import probe, udev  # noqa: PLC0415 - for doctor alone

    found = probe.probe()
    if found.reason is not None or found.interface is None or found.target is None:
        message = found.reason or "not usable"
        yield Finding(subject="device-mapper", state="missing", message=message)
        return
    interface, target = (".".join(map(str, each)) for each in (found.interface, found.target))
    message = f"is there: interface {interface}, thin-pool {target}"
    yield Finding(subject="device-mapper", state="ok", message=message)
    reason = probe.udev_rules()
    yield Finding(
        subject="udev-rules",
        state="ok" if reason is None else "note",
        message=reason or "guests' devices are left alone",
        remedy=None if reason is None else f"cp {udev.RULES_PATH} /etc/udev/rules.d/",
    )


def install_units(root: Path, *, units: Path | None, rules: Path | None) -> list[str]:
    """Write systemd units and udev rules."""
    from thinpool.dm import udev  # noqa: PLC0415 - for this alone
    from thinpool.host import units as unit_files  # noqa: PLC0415 - likewise

    directory = str(units) if units is not None else unit_files.DIRECTORY
    written = unit_files.install(str(root.absolute()), directory=directory)
    target = (rules if rules is not None else Path("/etc/udev/rules.d")) / udev.OWN_RULES
    text = Path(udev.__file__).with_name(udev.OWN_RULES).read_bytes()
    try:
        poolfile.write_atomically(target, text)
        target.chmod(0o644)
    except OSError as cause:
        raise failure(cause, f"cannot write {target}", path=str(target)) from cause
    return [*written, str(target)]
