"""Answers as text for people: lines, tables and trees."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from thinpool.cli.session import printable
from thinpool.units import format_percent, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from thinpool.model import CheckReport, DoctorReport, Fault, Finding, PoolStatus, Volume


def volume_line(volume: Volume) -> str:
    """What a volume is, in a line."""
    parts = [f"{volume}: {volume.kind}"]
    if volume.parent is not None:
        parts.append(f"of {volume.pool}/{volume.parent}")
    details = [format_size(volume.size)]
    if volume.filesystem is not None:
        details.append(volume.filesystem)
    if volume.read_only:
        details.append("read-only")
    if volume.device is not None:
        details.append(volume.device)
    details += [f"on {mount}" for mount in volume.mounts]
    return printable(f"{' '.join(parts)}, {', '.join(details)}")


def consistency_note(volume: Volume) -> str | None:
    """What a snapshot holds where its origin was in use and could not be frozen."""
    if volume.consistency != "crash":
        return None
    return (
        f"{volume} is crash-consistent: its origin was in use and could not be frozen, so it holds "
        "what a disk would hold after a power cut"
    )


def volume_table(volumes: Sequence[Volume], *, exclusive: bool, tree: bool) -> str:
    """``list``: a line each, perhaps indented below their parents."""
    if not volumes:
        return ""
    header = ["NAME", "KIND", "PARENT", "SIZE", "MAPPED"]
    if exclusive:
        header.append("EXCLUSIVE")
    header += ["CREATED", "DEVICE"]
    rows = []
    for prefix, volume in _as_tree(volumes) if tree else [("", each) for each in _sorted(volumes)]:
        row = [prefix + (volume.name if prefix else str(volume)), _kind(volume)]
        row += [volume.parent or "-", format_size(volume.size), format_size(volume.mapped)]
        if exclusive:
            row.append("-" if volume.exclusive is None else format_size(volume.exclusive))
        row += [_created(volume), " ".join((volume.device or "-", *volume.mounts))]
        rows.append(row)
    if tree:  # the tree shows the parents
        header.pop(2)
        for row in rows:
            row.pop(2)
    return table(header, rows, right={"SIZE", "MAPPED", "EXCLUSIVE"})


def pool_table(pools: Sequence[PoolStatus]) -> str:
    """``pools``: a line each."""
    header = ["POOL", "ENGINE", "MODE", "DATA", "USED", "METADATA", "USED", "VOLUMES", "ACTIVE"]
    rows = [
        [
            pool.pool,
            pool.engine,
            _mode(pool),
            format_size(pool.data.total),
            format_percent(pool.data.used, pool.data.total),
            format_size(pool.metadata.total),
            format_percent(pool.metadata.used, pool.metadata.total),
            str(pool.volumes),
            str(pool.active),
        ]
        for pool in pools
    ]
    return table(header, rows, right={"DATA", "USED", "METADATA", "VOLUMES", "ACTIVE"})


def pool_lines(pool: PoolStatus) -> str:
    """``status``: what it is, how full it is, what it does when full."""
    data, metadata = pool.data, pool.metadata
    host = "" if data.host_free is None else f", {format_size(data.host_free)} free on the host"
    lines = [
        ("pool", pool.pool),
        ("uuid", pool.uuid),
        ("engine", pool.engine),
        ("mode", _mode(pool)),
        ("transaction id", str(pool.transaction_id)),
        ("block size", format_size(pool.block_size)),
        ("data", f"{_used(data.used, data.total)} in {data.path}{host}"),
        ("metadata", f"{_used(metadata.used, metadata.total)} in {metadata.path}"),
        ("low water", f"{format_size(data.low_water)} free"),
        ("min free", f"{pool.min_free:g}%"),
        ("when full", pool.when_full),
        ("auto-extension", _autoextension(pool)),
        ("new blocks", "zeroed" if pool.zero else "not zeroed"),
        ("volumes", f"{pool.volumes}, {pool.active} active"),
    ]
    if pool.error is not None:
        lines.append(("error", str(pool.error.get("message", "unknown"))))
    return "\n".join(f"{key + ':':<16}{printable(value)}" for key, value in lines)


def check_lines(report: CheckReport, *, subject: str) -> str:
    """``check``: the whole report, and the verdict at its end."""
    lines = [_fault_line(fault) for fault in report.faults]
    counts = {
        severity: sum(1 for fault in report.faults if fault.severity == severity)
        for severity in ("fatal", "leak", "note")
    }
    others = len(report.faults) - sum(counts.values())
    found = [
        f"{count} {name}{'' if count == 1 or name == 'fatal' else 's'}"
        for name, count in counts.items()
        if count
    ]
    if others:
        found.append(f"{others} of a severity that this version does not know")
    verdict = "clean" if report.clean else "NOT CLEAN"
    transaction = "unknown" if report.transaction_id is None else str(report.transaction_id)
    detail = f" ({', '.join(found)})" if found else ""
    lines.append(f"{subject}: {verdict}{detail}, transaction id {transaction}")
    return "\n".join(printable(line) for line in lines)


def doctor_lines(report: DoctorReport) -> str:
    """``doctor``: the host, then each pool, with what mends what is wrong."""
    lines = ["host"]
    lines += _finding_lines(report.host)
    for name, findings in report.pools.items():
        lines.append(f"pool {name}")
        lines += _finding_lines(findings) or ["  ok       nothing is wrong"]
    return "\n".join(printable(line) for line in lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: set[str]) -> str:
    """Columns that line up, never cut: in a pipe as on a terminal.

    Not drawn by rich: it takes 0.6 ms a row, and a pool may hold tens of thousands.
    """
    cells = [list(header), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    aligned = [
        (">" if name in right else "<") + str(width)
        for name, width in zip(header, widths, strict=True)
    ]
    return "\n".join(
        "  ".join(f"{cell:{align}}" for cell, align in zip(row, aligned, strict=True)).rstrip()
        for row in cells
    )


def _sorted(volumes: Iterable[Volume]) -> list[Volume]:
    return sorted(volumes, key=lambda volume: (volume.pool, volume.created, volume.id))


def _as_tree(volumes: Sequence[Volume]) -> list[tuple[str, Volume]]:
    """Each volume behind what draws its branch; those whose parent is gone stand at the top.

    Iterative: a chain of snapshots may be longer than Python's stack is deep.
    """
    known = {(each.pool, each.name) for each in volumes}
    children: dict[tuple[str, str | None], list[Volume]] = {}
    for each in _sorted(volumes):
        parent = each.parent if (each.pool, each.parent) in known else None
        parent = None if parent == each.name else parent
        children.setdefault((each.pool, parent), []).append(each)
    branch, last, line, gap = _guides()
    drawn: list[tuple[str, Volume]] = []
    pools = sorted({each.pool for each in volumes}, reverse=True)
    stack: list[tuple[str, str, Volume]] = []
    for pool in pools:
        stack += [("", "", each) for each in reversed(children.get((pool, None), []))]
    while stack:
        prefix, below, volume = stack.pop()
        drawn.append((prefix, volume))
        kids = children.get((volume.pool, volume.name), [])
        for index in range(len(kids) - 1, -1, -1):
            final = index == len(kids) - 1
            stack.append(
                (below + (last if final else branch), below + (gap if final else line), kids[index])
            )
    return drawn


def _guides() -> tuple[str, str, str, str]:
    """Lines where the output's encoding has them, ASCII elsewhere."""
    guides = ("├── ", "└── ", "│   ", "    ")
    try:
        "".join(guides).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ("|-- ", "`-- ", "|   ", "    ")
    return guides


def _kind(volume: Volume) -> str:
    parts: list[str] = [volume.kind]
    if volume.read_only and volume.kind == "volume":
        parts.append("read-only")
    if volume.state != "ready":
        parts.append(volume.state)
    return ", ".join(parts)


def _created(volume: Volume) -> str:
    return volume.created.strftime("%Y-%m-%d %H:%M:%SZ")


def _mode(pool: PoolStatus) -> str:
    return f"{pool.mode}, needs check" if pool.needs_check else pool.mode


def _used(used: int, total: int) -> str:
    return f"{format_size(used)} of {format_size(total)} ({format_percent(used, total)})"


def _autoextension(pool: PoolStatus) -> str:
    if not pool.autoextend_threshold:
        return "off"
    return f"by {pool.autoextend_percent:g}% from {pool.autoextend_threshold:g}% on"


def _fault_line(fault: Fault) -> str:
    where = [fault.structure]
    if fault.block is not None:
        where.append(f"block {fault.block}")
    if fault.device_id is not None:
        where.append(f"device {fault.device_id}")
    return f"{fault.severity:<6}{' '.join(where)}: {fault.message} [{fault.type}]"


def _finding_lines(findings: Iterable[Finding]) -> list[str]:
    lines = []
    for each in findings:
        lines.append(f"  {each.state:<8} {each.subject}: {each.message}")
        if each.remedy:
            lines.append(f"  {'':<8} -> {each.remedy}")
    return lines
