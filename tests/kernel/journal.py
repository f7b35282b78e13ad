"""What files a volume may hold after its machine stopped cold, from what was fsynced before.

A writer works through operations one after another; each is durable before it is acknowledged. So
at a stop after n acknowledgements, n operations are certain. Of those that may have begun, a file
that is replaced is the old or the new one, one that is overwritten in place is old outside the
written range, and one that was being made is anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    from tests.kernel.trees import Script

Files = dict[str, bytes]
PAGE = 4096
KINDS = ("create", "create", "replace", "write", "write", "append", "cut", "remove")


@dataclass(frozen=True)
class Operation:
    """One change to one file, and the shell line that makes it and waits until it is durable.

    Attributes:
        path: of the file.
        after: its content then; None: it is gone.
        line: of shell.
        written: the range that changes in place; None: all of it is replaced at once, or anything
            may be there meanwhile.
        atomic: the file is the old or the new one at any time.
        beside: another path that may hold anything meanwhile.
    """

    path: str
    after: bytes | None
    line: str
    written: tuple[int, int] | None = None
    atomic: bool = False
    beside: str | None = None


def apply(files: Mapping[str, bytes], operations: Sequence[Operation]) -> Files:
    """The files after these operations."""
    found = dict(files)
    for operation in operations:
        if operation.after is None:
            found.pop(operation.path, None)
        else:
            found[operation.path] = operation.after
    return found


def plan(
    files: Mapping[str, bytes], random_: random.Random, script: Script, prefix: str, count: int
) -> list[Operation]:
    """Random operations, the first of which finds these files."""
    now = dict(files)
    found: list[Operation] = []
    for number in range(count):
        operation = _one(now, random_, script, f"{prefix}-{number}")
        found.append(operation)
        now = apply(now, [operation])
    return found


def _one(files: Mapping[str, bytes], random_: random.Random, script: Script, new: str) -> Operation:
    data = random_.randbytes(random_.choice((1, 3000, 20_000, 70_000, 250_000)))
    kind = random_.choice(
        ("create", "create", "replace", "write", "write", "append", "cut", "remove")
    )
    if not files or kind == "create":
        return Operation(new, data, f"cp {script.payload(data)} {new}; sync {new} .")
    path = random_.choice(sorted(files))
    old = files[path]
    if kind == "replace":
        line = f"cp {script.payload(data)} {new}; sync {new}; mv {new} {path}; sync ."
        return Operation(path, data, line, atomic=True, beside=new)
    if kind == "remove":
        return Operation(path, None, f"rm {path}; sync .", atomic=True)
    if kind == "cut":
        size = random_.randrange(len(old) + 1)
        line = f"truncate -s {size} {path}; sync {path}"
        # ext4 zeroes the rest of the last page before it commits the size.
        return Operation(path, old[:size], line, written=(size, -(-size // PAGE) * PAGE))
    offset = random_.randrange(len(old)) if kind == "write" and old else len(old)
    after = old[:offset] + data + old[offset + len(data) :]
    line = (f"dd if={script.payload(data)} of={path} bs=64K seek={offset} oflag=seek_bytes "
            "conv=notrunc,fsync status=none")  # fmt: skip
    return Operation(path, after, line, written=(offset, offset + len(data)))


def problems(
    found: Mapping[str, bytes],
    files: Mapping[str, bytes],
    operations: Sequence[Operation],
    *,
    certain: int,
    possible: int,
) -> list[str]:
    """What is wrong with the files that were found.

    Args:
        found: they.
        files: before the first operation.
        operations: of the volume's writer.
        certain: so many were acknowledged.
        possible: so many at most may have begun.
    """
    base = apply(files, operations[:certain])
    loose: dict[str, list[Operation]] = {}
    anything = set()
    for operation in operations[certain:possible]:
        loose.setdefault(operation.path, []).append(operation)
        if operation.beside is not None:
            anything.add(operation.beside)
    wrong = []
    for path in sorted(found.keys() | base.keys()):
        there, before = found.get(path), base.get(path)
        if there == before or path in anything:
            continue
        if path in loose:
            said = _in_flight(there, before, loose[path])
        elif there is None:
            said = "is gone"
        elif before is None:
            said = "should not be there"
        else:
            said = f"is not what was fsynced: {_where(there, before)}"
        if said:
            wrong.append(f"{path} {said}")
    return wrong


def _in_flight(
    there: bytes | None, before: bytes | None, operations: Sequence[Operation]
) -> str | None:
    """What is wrong with a file that these operations may have been changing; None: nothing."""
    values = [before, *(operation.after for operation in operations)]
    if there in values or any(o.written is None and not o.atomic for o in operations):
        return None  # whole, or in the making
    ranges = [operation.written for operation in operations if operation.written is not None]
    if not ranges:
        told = [
            f"{operation.line}: {_where(there, value)}"
            for operation in operations
            for value in (before, operation.after)
        ]
        return f"is neither the old nor a new one: {'; '.join(told)}"
    if any(operation.atomic for operation in operations):
        return None  # replaced and overwritten: it could be a mixture of many
    if there is None or before is None:
        return "is gone"
    for at, byte in enumerate(before[: len(there)]):
        if byte != there[at] and not any(start <= at < end for start, end in ranges):
            return f"changed at {at}, where nothing was written"
    least = min(len(value) for value in values if value is not None)
    return None if len(there) >= least else f"has {len(there)} of {least} bytes"


def _where(found: bytes | None, wanted: bytes | None) -> str:
    if found is None or wanted is None:
        return f"{'gone' if found is None else 'there'}, instead of the contrary"
    if len(found) != len(wanted):
        return f"{len(found)} bytes instead of {len(wanted)}"
    at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    last = max(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"wrong bytes from {at} to {last} of {len(wanted)}, {found[at : at + 8].hex()} there"
