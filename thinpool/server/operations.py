"""The operations that a server offers, by name: JSON in, a service's method, JSON out.

Nothing is decided here. Arguments are checked for their types where they enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from thinpool import errors
from thinpool.model import KINDS
from thinpool.store import care
from thinpool.store.making import Publication

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from thinpool.model import Kind
    from thinpool.store.core import Caller
    from thinpool.store.service import PoolService

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arguments:
    """A request's arguments, read by type."""

    values: Mapping[str, Any]

    def _of(self, name: str, kind: type, what: str) -> Any:  # noqa: ANN401 - JSON
        value = self.values.get(name)
        # JSON has no subclasses, and its truth values are no numbers.
        if value is not None and type(value) is not kind:
            raise errors.UsageError(f"'{name}' is no {what}", what=name, value=repr(value))
        return value

    def text(self, name: str) -> str:
        """A string that must be there."""
        value = self._of(name, str, "text")
        if value is None:
            raise errors.UsageError(f"'{name}' is missing", what=name)
        return str(value)

    def optional_text(self, name: str) -> str | None:
        """A string, or none."""
        value: str | None = self._of(name, str, "text")
        return value

    def number(self, name: str) -> int:
        """An integer that must be there."""
        value = self.optional_number(name)
        if value is None:
            raise errors.UsageError(f"'{name}' is missing", what=name)
        return value

    def optional_number(self, name: str) -> int | None:
        """An integer, or none."""
        value: int | None = self._of(name, int, "number")
        return value

    def flag(self, name: str) -> bool:
        """A truth value; false when it is not there."""
        return bool(self._of(name, bool, "truth value"))

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        value = self._of(name, list, "list") or []
        if not all(isinstance(each, str) for each in value):
            raise errors.UsageError(f"'{name}' is no list of texts", what=name)
        return list(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty when it is not there."""
        return dict(self._of(name, dict, "object") or {})

    def objects(self, name: str) -> list[Arguments]:
        """A list of objects."""
        value = self._of(name, list, "list") or []
        if not all(isinstance(each, dict) for each in value):
            raise errors.UsageError(f"'{name}' is no list of objects", what=name)
        return [Arguments(each) for each in value]

    def labels(self) -> dict[str, str]:
        """``labels``."""
        return {str(key): str(value) for key, value in self.mapping("labels").items()}

    def kind(self, name: str = "kind") -> Kind | None:
        """A volume's kind, or none."""
        value = self.optional_text(name)
        if value is None:
            return None
        for known in KINDS:
            if value == known:
                return known
        raise errors.UsageError(f"there is no kind {value}", what=name, value=value)

    def owner(self) -> tuple[int, int] | None:
        """``owner``: a user's and a group's id."""
        value = self._of("owner", list, "list")
        if value is None:
            return None
        user, group = value
        return int(user), int(group)


def _status(service: PoolService, _: Arguments, __: Caller) -> Json:
    return service.status().to_json()


def _list(service: PoolService, given: Arguments, _: Caller) -> list[Json]:
    if not given.flag("exclusive"):
        return service.documents()
    return [each.to_json() for each in service.volumes(exclusive=True)]


def _get(service: PoolService, given: Arguments, _: Caller) -> Json:
    return service.get(given.text("name")).to_json()


def _get_many(service: PoolService, given: Arguments, _: Caller) -> list[Json]:
    return [each.to_json() for each in service.get_many(given.texts("names"))]


def _by_label(service: PoolService, given: Arguments, _: Caller) -> list[Json]:
    return [each.to_json() for each in service.by_label(given.text("key"), given.text("value"))]


def _create(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.create(
        given.optional_text("name"),
        size=given.number("size"),
        kind=given.kind() or "volume",
        filesystem=given.optional_text("filesystem"),
        labels=given.labels(),
        lease=given.optional_text("lease"),
        caller=caller,
    ).to_json()


def _snapshot(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.snapshot(
        given.text("source"),
        given.optional_text("target"),
        kind=given.kind(),
        read_only=given.flag("read_only"),
        size=given.optional_number("size"),
        labels=given.labels(),
        lease=given.optional_text("lease"),
        caller=caller,
    ).to_json()


def _snapshot_many(service: PoolService, given: Arguments, caller: Caller) -> list[Json]:
    made = service.snapshot_many(
        given.text("source"), given.texts("targets"), labels=given.labels(), caller=caller
    )
    return [volume.to_json() for volume in made]


def _publish(service: PoolService, given: Arguments, caller: Caller) -> list[Json]:
    items = [
        Publication(
            name=item.text("name"),
            publish_as=item.text("publish_as"),
            kind=item.kind() or "volume",
            read_only=item.flag("read_only"),
            labels=item.labels(),
            filesystem=item.optional_text("filesystem"),
        )
        for item in given.objects("items")
    ]
    volumes = service.publish(items, lease=given.text("lease"), caller=caller)
    return [volume.to_json() for volume in volumes]


def _seal(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.seal(given.text("name"), lease=given.text("lease"), caller=caller).to_json()


def _rename(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.rename(given.text("name"), given.text("new"), caller=caller).to_json()


def _label(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.label(given.text("name"), given.mapping("labels"), caller=caller).to_json()


def _resize(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.resize(
        given.text("name"),
        given.number("size"),
        device_only=given.flag("device_only"),
        lease=given.optional_text("lease"),
        caller=caller,
    ).to_json()


def _remove(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.remove(
        given.texts("names"),
        deactivate=given.flag("deactivate"),
        deferred=given.flag("deferred"),
        dry_run=given.flag("dry_run"),
        caller=caller,
    ).to_json()


def _activate(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.activate(
        given.text("name"),
        read_only=given.flag("read_only"),
        by_mount=given.flag("by_mount"),
        persist=given.flag("persist"),
        owner=given.owner(),
        mode=given.optional_number("mode"),
        lease=given.optional_text("lease"),
        caller=caller,
    ).to_json()


def _activate_many(service: PoolService, given: Arguments, caller: Caller) -> list[Json]:
    made = service.activate_many(
        given.texts("names"),
        read_only=given.flag("read_only"),
        by_mount=given.flag("by_mount"),
        owner=given.owner(),
        mode=given.optional_number("mode"),
        caller=caller,
    )
    return [activation.to_json() for activation in made]


def _deactivate(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.deactivate(
        given.text("name"),
        if_by_mount=given.flag("if_by_mount"),
        deferred=given.flag("deferred"),
        lease=given.optional_text("lease"),
        caller=caller,
    ).to_json()


def _resume(service: PoolService, _: Arguments, __: Caller) -> Json:
    return service.resume().to_json()


def _configure(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.configure(given.mapping("values"), caller=caller).to_json()


def _extend(service: PoolService, given: Arguments, caller: Caller) -> Json:
    return service.extend(
        data_size=given.optional_number("data_size"),
        metadata_size=given.optional_number("metadata_size"),
        caller=caller,
    ).to_json()


def _finish_creation(service: PoolService, _: Arguments, __: Caller) -> Json:
    return service.finish_creation().to_json()


def _doctor(service: PoolService, _: Arguments, __: Caller) -> list[Json]:
    return [finding.to_json() for finding in service.doctor()]


def _delta(service: PoolService, given: Arguments, _: Caller) -> Json:
    left, right, lease = given.text("left"), given.text("right"), given.optional_text("lease")
    return care.delta(service, left, right, lease=lease).to_json()


def _close_lease(service: PoolService, given: Arguments, _: Caller) -> Json:
    service.close_lease(given.text("lease"))
    return {}


OPERATIONS: Final[Mapping[str, Callable[[PoolService, Arguments, Caller], Any]]] = {
    "status": _status,
    "list": _list,
    "get": _get,
    "get_many": _get_many,
    "by_label": _by_label,
    "create": _create,
    "snapshot": _snapshot,
    "snapshot_many": _snapshot_many,
    "publish": _publish,
    "seal": _seal,
    "rename": _rename,
    "label": _label,
    "resize": _resize,
    "remove": _remove,
    "activate": _activate,
    "activate_many": _activate_many,
    "deactivate": _deactivate,
    "resume": _resume,
    "configure": _configure,
    "extend": _extend,
    "finish_creation": _finish_creation,
    "doctor": _doctor,
    "delta": _delta,
    "close_lease": _close_lease,
}
"""Every operation that answers one document."""


def _check(service: PoolService, _: Arguments, __: Caller, tell: Callable[[Json], None]) -> Json:
    report = care.check(service, progress=lambda progress: tell({"progress": progress.to_json()}))
    return report.to_json()


def _dump(service: PoolService, _: Arguments, __: Caller, tell: Callable[[Json], None]) -> Json:
    care.dump(service, lambda text: tell({"chunk": text}))
    return {}


STREAMS: Final[
    Mapping[str, Callable[[PoolService, Arguments, Caller, Callable[[Json], None]], Any]]
] = {
    "check": _check,
    "dump": _dump,
}
"""Every operation that answers a stream of documents."""
