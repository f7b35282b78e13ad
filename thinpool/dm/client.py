"""The device-mapper client: devices by name, one method a command, and the usual sequences.

Every method is one ioctl unless it says otherwise, takes the device by its name, and may block in
the kernel. Devices that appear (``resume``, ``activate``, ``rename``) are returned when their node
under /dev/mapper exists and udevd, where it runs, has finished with them. Nothing here is kept on
disk: a device-mapper device ends with the kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from thinpool import errors
from thinpool.dm import abi, nodes, refusals, udev
from thinpool.dm.control import Control, KernelLog, as_kind, failure
from thinpool.dm.events import DeviceEvents
from thinpool.dm.status import TargetStatus
from thinpool.dm.targets import Target, device_text, parse_target
from thinpool.host.holders import describe, find_holders
from thinpool.host.mountinfo import own_mounts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from thinpool.dm.abi import DeviceEntry, Header

UUID_PREFIX: Final = "THINPOOL-"
"""Of every device of ours: our udev rules know them by it."""

REMOVE_SECONDS: Final = 2.0
"""How long a removal waits for a device that somebody has open for a moment."""

_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device as the kernel has it.

    Attributes:
        name: its name; ``path``: its node, /dev/mapper/NAME; ``number``: its device number.
        uuid: its uuid, None where it has none.
        open_count: how often it is open, mounts and devices on top included.
        event_nr: counts its events; for wait_event.
        target_count: targets in its live table.
        suspended: I/O waits.
        read_only: it takes no writes.
        live, inactive: whether it has a live table; one that the next resume makes live.
        deferred_remove: it goes when it is closed.
    """

    name: str
    path: str
    number: int
    uuid: str | None
    open_count: int
    event_nr: int
    target_count: int
    suspended: bool
    read_only: bool
    live: bool
    inactive: bool
    deferred_remove: bool

    @classmethod
    def of(cls, header: Header) -> DeviceInfo:
        """From a reply."""
        flags = header.flags
        name = abi.header_name(header)
        return cls(
            name=name,
            path=nodes.path_of(name),
            number=abi.decode_device(header.dev),
            uuid=abi.header_uuid(header),
            open_count=header.open_count,
            event_nr=header.event_nr,
            target_count=header.target_count,
            suspended=bool(flags & abi.Flag.SUSPEND),
            read_only=bool(flags & abi.Flag.READONLY),
            live=bool(flags & abi.Flag.ACTIVE_PRESENT),
            inactive=bool(flags & abi.Flag.INACTIVE_PRESENT),
            deferred_remove=bool(flags & abi.Flag.DEFERRED_REMOVE),
        )


class DeviceMapper:
    """The kernel's device-mapper. Thread-safe; a context manager."""

    def __init__(
        self,
        *,
        udev_mode: udev.UdevMode | None = None,
        udev_seconds: float = udev.WAIT_SECONDS,
        quiet: bool = True,
    ) -> None:
        """Open the control device.

        Args:
            udev_mode: how udev is waited for; None for what works here, which is found out,
                and our udev rules put in place for, when the first device is made.
            udev_seconds: how long udevd may take for one device.
            quiet: tell udev's rules to leave our devices alone: no probing, no links.

        Raises:
            UnsupportedHostError: the kernel has no device-mapper, or an unknown one.
            NotPermittedError: this user may not use it.
        """
        self._control = Control()
        self._udev_mode = udev_mode
        self._udev_seconds = udev_seconds
        self._quiet = quiet

    # ---- the kernel ---------------------------------------------------------------------

    @property
    def version(self) -> tuple[int, int, int]:
        """The interface's version, as the kernel said when this was opened."""
        return self._control.versions

    @property
    def udev_mode(self) -> udev.UdevMode:
        """How udev is waited for, or would be as things are."""
        return udev.detect() if self._udev_mode is None else self._udev_mode

    def target_versions(self) -> dict[str, tuple[int, int, int]]:
        """The target types that are loaded, with their versions."""
        command = abi.Command.LIST_VERSIONS
        try:
            header, buffer = self._control.call(command)
        except OSError as cause:
            raise failure(command, None, cause.errno or 0, "cannot list target types") from cause
        return dict(abi.unpack_versions(buffer, header))

    def target_version(self, kind: str) -> tuple[int, int, int] | None:
        """The version of a target type, whose module is loaded if need be; None for none."""
        command = abi.Command.GET_TARGET_VERSION
        try:
            header, buffer = self._control.call(command, name=kind)
        except OSError as cause:
            if cause.errno == errno.EINVAL:
                return None
            if cause.errno == errno.ENOTTY:  # before Linux 5.5
                return self.target_versions().get(kind)
            raise failure(command, None, cause.errno or 0, f"cannot ask for {kind}") from cause
        return dict(abi.unpack_versions(buffer, header)).get(kind)

    # ---- looking ------------------------------------------------------------------------

    def devices(self, *, name_prefix: str = "", uuid_prefix: str = "") -> tuple[DeviceEntry, ...]:
        """All devices whose name and uuid begin so.

        One ioctl; on kernels before Linux 5.15, which list no uuids, one more a device.
        """
        command = abi.Command.LIST_DEVICES
        try:
            header, buffer = self._control.call(command, flags=abi.Flag.UUID)
        except OSError as cause:
            raise failure(command, None, cause.errno or 0, "cannot list devices") from cause
        found = []
        for entry in abi.unpack_devices(buffer, header):
            if not entry.name.startswith(name_prefix):
                continue
            known = entry
            if not entry.uuid_known:
                info = self.find(entry.name)
                if info is None:
                    continue
                known = entry._replace(uuid=info.uuid, uuid_known=True)
            if (known.uuid or "").startswith(uuid_prefix):
                found.append(known)
        return tuple(found)

    def info(self, name: str) -> DeviceInfo:
        """A device's state.

        Raises:
            NotFoundError: no such device.
        """
        return DeviceInfo.of(self._call(abi.Command.DEV_STATUS, name, "cannot look at")[0])

    def find(self, name: str) -> DeviceInfo | None:
        """A device's state; None where there is none of that name."""
        try:
            return self.info(name)
        except errors.NotFoundError:
            return None

    def table(self, name: str, *, inactive: bool = False) -> tuple[Target, ...]:
        """The live table, or the one that the next resume makes live.

        Raises:
            NotFoundError: no such device.
        """
        flags: int = abi.Flag.STATUS_TABLE
        if inactive:
            flags |= abi.Flag.QUERY_INACTIVE_TABLE
        return tuple(parse_target(line) for line in self._lines(name, flags))

    def status(self, name: str, *, noflush: bool = True) -> tuple[TargetStatus, ...]:
        """What the device's targets say about themselves.

        Args:
            name: the device.
            noflush: without it, a pool commits first, so that its counters are exact.

        Raises:
            NotFoundError: no such device.
        """
        flags = abi.Flag.NOFLUSH if noflush else 0
        return tuple(TargetStatus.of(line) for line in self._lines(name, flags))

    def deps(self, name: str) -> tuple[int, ...]:
        """The numbers of the devices that the live table stands on.

        Raises:
            NotFoundError: no such device.
        """
        header, buffer = self._call(abi.Command.TABLE_DEPS, name, "cannot read the dependencies of")
        return abi.unpack_deps(buffer, header)

    # ---- making and changing ------------------------------------------------------------

    def create(self, name: str, *, uuid: str | None = None, minor: int | None = None) -> DeviceInfo:
        """Make a device without a table: suspended, and without a node until it is resumed.

        Args:
            name: 1 to 127 of the characters that udev leaves as they are.
            uuid: for ever the device's; ``UUID_PREFIX`` begins those of ours.
            minor: its minor number; None for any.

        Raises:
            UsageError: no such name or uuid can be.
            AlreadyExistsError: a device has the name or the uuid; ``existing`` is its name.
        """
        nodes.check_name(name)
        if uuid is not None:
            nodes.check_uuid(uuid)
        flags, dev = 0, 0
        if minor is not None:
            flags, dev = abi.Flag.PERSISTENT_DEV, abi.encode_device(os.makedev(0, minor))
        command = abi.Command.DEV_CREATE
        try:
            header, _ = self._control.call(command, name=name, uuid=uuid, flags=flags, dev=dev)
        except OSError as cause:
            raise self._not_created(name, uuid, minor, cause) from cause
        return DeviceInfo.of(header)

    def load(self, name: str, targets: Sequence[Target], *, read_only: bool = False) -> DeviceInfo:
        """Put a table in the inactive slot; ``resume`` makes it live.

        Args:
            name: the device.
            targets: from sector 0 on without gaps, in order.
            read_only: the device takes no writes from then on. Not for pools.

        Raises:
            NotFoundError: no such device; no device or thin id that the table names.
            BusyError: another pool has the metadata device; something holds a device of the
                table: ``holder``.
            UnsupportedHostError: the kernel has no such target.
            CorruptMetadataError: the metadata device holds no pool, or a damaged one.
            DeviceMapperError: refused otherwise; ``log`` is what the kernel wrote about it.
        """
        lines = [target.line() for target in targets]
        command = abi.Command.TABLE_LOAD
        with KernelLog() as log:
            try:
                header, _ = self._control.call(
                    command, name=name, flags=abi.Flag.READONLY if read_only else 0,
                    target_count=len(lines), payload=abi.pack_table(lines),
                )  # fmt: skip
            except OSError as cause:
                raise refusals.of_table(self, name, targets, cause, log.lines()) from cause
        return DeviceInfo.of(header)

    def clear(self, name: str) -> DeviceInfo:
        """Drop the inactive table.

        Raises:
            NotFoundError: no such device.
        """
        header, _ = self._call(abi.Command.TABLE_CLEAR, name, "cannot clear the new table of")
        return DeviceInfo.of(header)

    def suspend(self, name: str, *, noflush: bool = False, skip_lockfs: bool = False) -> DeviceInfo:
        """Let I/O wait; what is under way ends first.

        Args:
            name: the device.
            noflush: I/O that the target has queued stays queued, as a full pool's.
            skip_lockfs: don't freeze a filesystem that is mounted on it.

        Raises:
            NotFoundError: no such device.
        """
        flags: int = abi.Flag.SUSPEND
        if noflush:
            flags |= abi.Flag.NOFLUSH
        if skip_lockfs:
            flags |= abi.Flag.SKIP_LOCKFS
        try:
            header, _ = self._call(abi.Command.DEV_SUSPEND, name, "cannot suspend", flags=flags)
        except errors.DeviceMapperError as error:
            # The kernel has nothing to do where a device is suspended, but for who comes while
            # another one suspends it: that is refused.
            found = self.find(name) if error.errno == errno.EINVAL else None
            if found is None or not found.suspended:
                raise
            return found
        return DeviceInfo.of(header)

    def resume(self, name: str) -> DeviceInfo:
        """Make the loaded table live, if there is one, and let I/O go on.

        Returns:
            The device, whose node exists and which udevd has finished with.

        Raises:
            NotFoundError: no such device.
            DeviceMapperError: the new table cannot go live (a pool that would shrink); the
                device stays suspended, with that table: load another and resume.
            TimeoutError_: udevd doesn't finish; the device is live.
        """
        return self._resumed(name, self._wait(name))

    def activate(
        self,
        name: str,
        targets: Sequence[Target],
        *,
        uuid: str | None = None,
        read_only: bool = False,
    ) -> DeviceInfo:
        """Make a device with a table and let it live: create, load, resume.

        Raises:
            UsageError, AlreadyExistsError: as ``create``; nothing was made.
            NotFoundError, BusyError, DeviceMapperError, …: as ``load`` and ``resume``; what was
                made is removed again.
        """
        self.create(name, uuid=uuid)
        try:
            self.load(name, targets, read_only=read_only)
            return self.resume(name)
        except BaseException:
            with contextlib.suppress(errors.ThinpoolError):
                self.remove(name)
            raise

    def reload(
        self,
        name: str,
        targets: Sequence[Target],
        *,
        read_only: bool = False,
        noflush: bool = False,
        skip_lockfs: bool = False,
    ) -> DeviceInfo:
        """Give a live device another table: load, suspend, resume.

        Where the new table cannot go live, the old one is put back and the device resumed.

        Raises:
            NotFoundError, BusyError, DeviceMapperError, …: as ``load`` and ``resume``; the
                device goes on with its old table.
        """
        before, was_read_only = self.table(name), self.info(name).read_only
        self.load(name, targets, read_only=read_only)
        try:
            self.suspend(name, noflush=noflush, skip_lockfs=skip_lockfs)
        except BaseException:
            with contextlib.suppress(errors.ThinpoolError):
                self.clear(name)
            raise
        try:
            return self.resume(name)
        except errors.TimeoutError_:
            raise  # it is live; only udevd is late
        except BaseException:
            if before:
                self.load(name, before, read_only=was_read_only)
                self.resume(name)
            raise

    @contextlib.contextmanager
    def suspended(
        self, name: str, *, noflush: bool = False, skip_lockfs: bool = False
    ) -> Iterator[DeviceInfo]:
        """The device suspended for the block's duration, resumed on every way out."""
        info = self.suspend(name, noflush=noflush, skip_lockfs=skip_lockfs)
        try:
            yield info
        finally:
            # Without another table there is no event: I/O doesn't wait for our getting ready.
            found = self.find(name)
            still = found is not None and not found.inactive
            self._resumed(name, udev.no_wait() if still else self._wait(name))

    def rename(self, name: str, new: str) -> DeviceInfo:
        """Give a device another name; its node follows.

        Raises:
            UsageError: no such name can be.
            NotFoundError: no such device.
            AlreadyExistsError: the new name is taken.
        """
        nodes.check_name(new)
        with self._wait(new) as wait:
            header = self._renamed(name, new, 0, wait.event_nr)
            _await_udev(wait, header)
        info = self.info(new)
        self._drop_node(name)
        if info.live:
            self._node(info)
        return info

    def set_uuid(self, name: str, uuid: str) -> DeviceInfo:
        """Give a device that has no uuid one, for ever.

        Raises:
            UsageError: no such uuid can be.
            NotFoundError: no such device.
            AlreadyExistsError: another device has it.
            DeviceMapperError: the device has one.
        """
        nodes.check_uuid(uuid)
        self._renamed(name, uuid, abi.Flag.UUID, 0)
        return self.info(name)

    def remove(self, name: str, *, deferred: bool = False, timeout: float = REMOVE_SECONDS) -> bool:
        """Remove a device, and its node.

        A device that is open for a moment (udev, blkid, a monitor looked at it) is waited for.

        Args:
            name: the device.
            deferred: where it is in use, let it go when it is closed, instead of waiting.
            timeout: seconds to wait for others to close it; 0 for one try.

        Returns:
            True when it is gone; False when it goes later. Its link goes with it; a node that we
            made goes at once.

        Raises:
            NotFoundError: no such device.
            BusyError: it is in use: ``holder`` says by whom, where that is found.
        """
        flags = abi.Flag.DEFERRED_REMOVE if deferred else 0
        deadline = time.monotonic() + timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._removed(name, flags)
            except errors.BusyError as busy:
                over = time.monotonic() >= deadline
                holder = self._holder(name, thorough=over)
                if holder is not None or over:
                    raise _in_use(name, holder) from busy
            time.sleep(pause)  # nothing announces the last close of a device
            pause = min(2 * pause, _LONGEST_PAUSE)

    def cancel_deferred_remove(self, name: str) -> None:
        """Let a device that was to go when closed stay.

        Raises:
            NotFoundError: no such device.
            BusyError: it is going.
        """
        self.message(name, "@cancel_deferred_remove")
        info = self.info(name)
        if info.live:
            self._node(info)

    def message(self, name: str, text: str, *, sector: int = 0) -> str | None:
        """Send a message to the target at a sector, or with ``@`` to device-mapper itself.

        Success of a pool's message doesn't say that the commit behind it succeeded: ThinPool's
        methods look at the status too.

        Returns:
            The answer, where the message has one.

        Raises:
            NotFoundError: no such device.
            DeviceMapperError: refused; by errno also AlreadyExistsError, BusyError, …
        """
        command = abi.Command.TARGET_MSG
        encoded = os.fsencode(text)
        if b"\0" in encoded:
            raise errors.UsageError(f"a message holds no NUL: {text!r}")
        payload = abi.MESSAGE.pack(sector) + encoded + b"\0"
        with KernelLog() as log:
            try:
                header, buffer = self._control.call(command, name=name, payload=payload)
            except OSError as cause:
                raise refusals.of_message(name, text, cause, log.lines()) from cause
        if header.flags & abi.Flag.DATA_OUT:
            return abi.text_at(buffer, header.data_start, header.data_size)
        return None

    # ---- events -------------------------------------------------------------------------

    def wait_event(self, name: str, event_nr: int, *, timeout: float | None = None) -> int | None:
        """Wait until a device's event number is another than ``event_nr``.

        For waits that another thread may end, use ``DeviceEvents`` directly.

        Returns:
            The number now; None when ``timeout`` seconds were over.

        Raises:
            NotFoundError: no such device, or it ended meanwhile.
        """
        with DeviceEvents() as events:
            return events.wait(name, event_nr, timeout=timeout)

    # ---- ending -------------------------------------------------------------------------

    def close(self) -> None:
        """Let go; devices stay as they are."""
        self._control.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    # ---- the steps ----------------------------------------------------------------------

    def _call(
        self, command: abi.Command, name: str, asked: str, *, flags: int = 0
    ) -> tuple[Header, bytearray]:
        try:
            return self._control.call(command, name=name, flags=flags)
        except OSError as cause:
            raise refusals.of_device(command, name, cause, f"{asked} the device {name}") from cause

    def _lines(self, name: str, flags: int) -> tuple[abi.TableLine, ...]:
        header, buffer = self._call(
            abi.Command.TABLE_STATUS, name, "cannot read the table of", flags=flags
        )
        return abi.unpack_table(buffer, header)

    def _wait(self, name: str) -> udev.Wait:
        if self._udev_mode is None:
            self._udev_mode = udev.prepare()  # twice, by two threads, is once
        return udev.wait_for(self._udev_mode, name, quiet=self._quiet, seconds=self._udev_seconds)

    def _resumed(self, name: str, around: udev.Wait) -> DeviceInfo:
        with around as wait, KernelLog() as log:
            try:
                header, _ = self._control.call(
                    abi.Command.DEV_SUSPEND, name=name, event_nr=wait.event_nr
                )
            except OSError as cause:
                raise refusals.of_resume(name, cause, log.lines()) from cause
            _await_udev(wait, header)
        info = DeviceInfo.of(header)
        if info.live:
            self._node(info)
        return info

    def _node(self, info: DeviceInfo) -> None:
        try:
            nodes.make(info.name, info.number)
        except OSError as cause:
            why = os.strerror(cause.errno or 0)
            message = f"the device {info.name} is live, but {info.path} cannot be made: {why}"
            raise errors.UnsupportedHostError(
                message, missing=info.path, device=info.name, errno=cause.errno
            ) from cause

    def _removed(self, name: str, flags: int) -> bool:
        """One try. Nobody needs udevd to be finished with what is gone: only its link goes now.

        What udevd does for it later comes before what it does for the next device of that
        number, which is waited for.
        """
        command = abi.Command.DEV_REMOVE
        try:
            header, _ = self._control.call(command, name=name, flags=flags)
        except OSError as cause:
            said = f"cannot remove the device {name}"
            raise refusals.of_device(command, name, cause, said) from cause
        later = bool(header.flags & abi.Flag.DEFERRED_REMOVE) and self._going(name)
        if not later or not os.path.islink(nodes.path_of(name)):
            # A link is udevd's, and goes with the device; a node is ours, and nobody would be
            # there to remove it then.
            self._drop_node(name)
        return not later

    def _going(self, name: str) -> bool:
        info = self.find(name)
        return info is not None and info.deferred_remove

    def _drop_node(self, name: str) -> None:
        def stays() -> bool:
            info = self.find(name)
            return info is not None and not info.deferred_remove

        nodes.remove(name, stays)

    def _holder(self, name: str, *, thorough: bool) -> str | None:
        """Who holds a device; unless thorough, only what lasts and is found at a glance."""
        info = self.find(name)
        if info is None:
            return None
        if thorough:
            return describe(find_holders(info.number, path=info.path))
        device = device_text(info.number)
        for entry in own_mounts():
            if entry.device == info.number:
                return f"mounted on {entry.mount_point}"
        above: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            above = sorted(os.listdir(f"/sys/dev/block/{device}/holders"))
        return f"used by the device /dev/{above[0]}" if above else None

    def _renamed(self, name: str, new: str, flags: int, event_nr: int) -> Header:
        command = abi.Command.DEV_RENAME
        payload = os.fsencode(new) + b"\0"
        try:
            header, _ = self._control.call(
                command, name=name, flags=flags, event_nr=event_nr, payload=payload
            )
        except OSError as cause:
            if cause.errno == errno.EBUSY:
                message = f"cannot name the device {name} {new}: another device is"
                raise as_kind(errors.AlreadyExistsError, command, name, errno.EBUSY, message,
                              existing=new) from cause  # fmt: skip
            said = f"cannot name the device {name} {new}"
            raise refusals.of_device(command, name, cause, said) from cause
        return header

    def _not_created(
        self, name: str, uuid: str | None, minor: int | None, cause: OSError
    ) -> errors.ThinpoolError:
        command, number = abi.Command.DEV_CREATE, cause.errno or 0
        there = self.devices() if number in (errno.EBUSY, errno.ENXIO) else ()
        if minor is not None and minor in {os.minor(entry.number) for entry in there}:
            said = f"cannot make the device {name}: the minor number {minor} is taken"
            return as_kind(errors.BusyError, command, name, number, said)
        if number != errno.EBUSY:
            return failure(command, name, number, f"cannot make the device {name}")
        taken = [e.name for e in there if name == e.name or (uuid and uuid == e.uuid)]
        existing = taken[0] if taken else name
        has = "its name" if existing == name else f"the uuid {uuid}"
        said = f"cannot make the device {name}: the device {existing} has {has} already"
        return as_kind(errors.AlreadyExistsError, command, name, errno.EBUSY, said,
                       existing=existing)  # fmt: skip


def _await_udev(wait: udev.Wait, header: Header) -> None:
    raised = bool(header.flags & abi.Flag.UEVENT_GENERATED)
    wait.finished(abi.decode_device(header.dev), raised=raised)


def _in_use(name: str, holder: str | None) -> errors.ThinpoolError:
    said = holder or "somebody has it open, who was not seen"
    message = f"the device {name} is in use: {said}; end that, or remove it deferred"
    return as_kind(
        errors.BusyError, abi.Command.DEV_REMOVE, name, errno.EBUSY, message, holder=holder
    )
