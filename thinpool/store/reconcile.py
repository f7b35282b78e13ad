"""Bring the catalogue and the pool together after whatever came between them.

Every change goes through these steps; a crash falls into one of the gaps:

1. the intent is written          before: nothing happened
2. the pool commits the change    between 1 and 2: its transaction id is the expected one, and the
                                  intent is dropped
3. the result replaces the intent between 2 and 3: its transaction id is the new one, and the
                                  result is recorded now

Of the kernel's pools step 2 is a commit for the change and another for the transaction id. Between
them the id is the expected one, and the volumes say what happened: one that was made is removed
again, since nobody was told of it; one that was deleted cannot come back, so the deletion is
finished. Either engine does so: after a crash the next one to open the pool may be the other.

A power cut may take the results of several changes that were done one after the other, for results
are not flushed; the log of intents has kept their intents. Each but the last was settled before the
next was written, and the next tells how: it begins at the transaction that the earlier one led to,
or, where that was not done, at the same.

A transaction id that is neither means that something else changed the pool, or that older metadata
was put in its place. Then ids decide: what the pool has and the catalogue does not is adopted as
``id-N`` and never deleted; what the catalogue has and the pool does not is ``missing``, keeps its
name until it is removed, and comes back if the pool's does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from thinpool.engine import Change, ChangeKind
from thinpool.model import Finding, format_time
from thinpool.store.adopt import look_at
from thinpool.store.catalogue import BUILDING, DELETING, MISSING, READY, Record
from thinpool.store.crashpoint import reached

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

    from thinpool.engine import PoolBackend, VolumeInfo
    from thinpool.model import VolumeId
    from thinpool.store.catalogue import Catalogue, Intent

KEY = "transaction_id"
FINDINGS = "findings"


def reconcile(
    catalogue: Catalogue,
    pool: PoolBackend,
    *,
    known: Callable[[], Mapping[VolumeId, Record]] | None = None,
) -> list[Finding]:
    """Mend the catalogue so that it tells the pool's truth.

    Changes nothing in the pool but what an intent of engine dm left half done.

    Args:
        catalogue: of the pool.
        pool: open.
        known: tells what a copy of the names says; asked when the catalogue lacks volumes.

    Returns:
        What was found and mended, or remains wrong.
    """
    findings: list[Finding] = []
    settled = settle_intent(catalogue, pool)
    if settled is not None:
        findings.append(settled)
    status = pool.status()
    with catalogue.transaction():
        recorded = catalogue.get(KEY)
        if recorded is not None and int(recorded) != status.transaction_id:
            findings.append(
                Finding(
                    subject="transaction id",
                    state="wrong" if int(recorded) > status.transaction_id else "note",
                    message=f"the pool is at transaction {status.transaction_id}, the names "
                    f"belong to {recorded}: something else changed the pool, or "
                    "other metadata was put in its place",
                )
            )
        in_pool = pool.mapped_blocks()
        states = catalogue.states()
        _settle_missing(catalogue, states, in_pool, findings)
        strangers = [pool.volume_info(each) for each in in_pool if each not in states]
    # Looking at strangers reads the disk: not within a transaction of the catalogue.
    names = known() if known is not None and strangers else {}
    adopted = [_adopt(catalogue, pool, info, status.data_block_size, names) for info in strangers]
    with catalogue.transaction():
        for record, finding in sorted(adopted, key=lambda each: each[0].id):
            parent = record.parent
            if parent is not None and catalogue.by_id(parent) is None:
                record = _without_parent(record)  # noqa: PLW2901 - the same record, mended
            catalogue.insert(record)
            if finding is not None:
                findings.append(finding)
        catalogue.put(KEY, str(status.transaction_id))
        if findings:
            catalogue.put(FINDINGS, json.dumps([finding.to_json() for finding in findings]))
    return findings


def settle_intent(catalogue: Catalogue, pool: PoolBackend) -> Finding | None:
    """Bring an intent that stands to its end: recorded, finished, undone or forgotten.

    Repeatable: a crash during it leaves what it can settle again.

    Returns:
        What was found; None where no intent stood.

    Raises:
        ThinpoolError: the pool has to be changed for it, and cannot be. The intent stays.
    """
    standing = catalogue.intents()
    if not standing:
        return None
    found = pool.status().transaction_id
    for earlier, later in pairwise(standing):
        # It was settled before the later one was written, and a power cut took the record of it.
        if earlier.new <= min(found, later.expected):
            catalogue.complete_intent(earlier)
        else:
            catalogue.drop_intent()
    intent = standing[-1]
    if found == intent.new:
        catalogue.complete_intent(intent)
        message = f"'{intent.operation}' had been done when the server died: recorded now"
    elif found != intent.expected:
        catalogue.drop_intent()
        return Finding(
            subject="intent",
            state="wrong",
            message=f"'{intent.operation}' was under way from transaction {intent.expected} "
            f"to {intent.new}, and the pool is at {found}: ids were compared instead",
        )
    elif (half := _half_done(intent, pool)) is not None:
        message = _mend(half, intent, catalogue, pool)
    else:
        catalogue.drop_intent()
        message = f"'{intent.operation}' had not been done when the server died: forgotten"
    return Finding(subject="intent", state="note", message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Half:
    """What there is of an intent whose transaction id was not set.

    Attributes:
        made: volumes that were made.
        left: deletions that are still to be done, others being done.
    """

    made: tuple[VolumeId, ...] = ()
    left: tuple[Change, ...] = ()


def _half_done(intent: Intent, pool: PoolBackend) -> _Half | None:
    """Compare an intent's changes with the volumes; None where nothing of it happened."""
    there = {info.id: info for info in pool.volumes()}
    made = []
    left = []
    deleted = False
    for change in intent.changes:
        info = there.get(change.id)
        if change.kind is ChangeKind.DELETE:
            deleted = deleted or info is None
            if info is not None:
                left.append(change)
        elif info is not None and info.transaction_id == intent.expected:
            # Of an id that the pool did not have when the intent was written. One made at another
            # transaction is somebody else's.
            made.append(change.id)
    if deleted:
        return _Half(left=tuple(left))
    return _Half(made=tuple(made)) if made else None


def _mend(half: _Half, intent: Intent, catalogue: Catalogue, pool: PoolBackend) -> str:
    """Undo what was made, or finish what was deleted; says which."""
    if half.made:
        undo = [Change(kind=ChangeKind.DELETE, id=each) for each in half.made]
        pool.apply(undo, expected=intent.expected, new=intent.expected)
        reached("intent-undone")
        catalogue.drop_intent()
        return (
            f"'{intent.operation}' was half done when the server died: the device that it had made "
            "is removed again"
        )
    pool.apply(half.left, expected=intent.expected, new=intent.new)
    reached("intent-finished")
    catalogue.complete_intent(intent)
    return f"'{intent.operation}' was half done when the server died: finished now"


def _settle_missing(
    catalogue: Catalogue,
    states: Mapping[VolumeId, str],
    in_pool: Container[VolumeId],
    findings: list[Finding],
) -> None:
    for volume_id, state in states.items():
        if volume_id in in_pool and state != MISSING:
            continue  # as nearly all are: they are not even read
        record = catalogue.by_id(volume_id)
        if record is None:
            continue
        if volume_id in in_pool:
            catalogue.update(record, state=READY)
            findings.append(
                Finding(subject=record.name, state="note", message="is in the pool again")
            )
            continue
        catalogue.delete_activations([record.id])
        if record.state in {BUILDING, DELETING}:
            catalogue.delete(record.id)
        elif record.state == READY:
            catalogue.update(record, state=MISSING)
            findings.append(
                Finding(
                    subject=record.name,
                    state="wrong",
                    message=f"the pool has no device {record.id} any more",
                    remedy="thinpool remove POOL/" + record.name,
                )
            )


def _adopt(
    catalogue: Catalogue,
    pool: PoolBackend,
    info: VolumeInfo,
    block_size: int,
    known: Mapping[VolumeId, Record],
) -> tuple[Record, Finding | None]:
    found = known.get(info.id)
    if found is not None and catalogue.find(found.name) is None:
        return found, None
    size = look_at(pool, info, block_size=block_size)
    name = f"id-{info.id}"
    suffix = 1
    while catalogue.find(name) is not None:
        suffix += 1
        name = f"id-{info.id}-{suffix}"
    record = Record(
        id=info.id,
        name=name,
        kind="volume",
        parent=None,
        size=size.size,
        read_only=False,
        created=format_time(datetime.now(UTC)),
        filesystem=size.filesystem,
        labels={} if size.exact else {"size": "least"},
    )
    how = "its filesystem says" if size.exact else "its highest mapping ends at"
    return record, Finding(
        subject=name,
        state="note",
        message=f"device {info.id} had no name; size {size.size} is what {how}",
        remedy=f"thinpool rename POOL/{name} POOL/NAME",
    )


def _without_parent(record: Record) -> Record:
    return Record(**{**{f: getattr(record, f) for f in Record.__slots__}, "parent": None})
