"""A server program for tests: one JSON command a line, one JSON answer a line.

It stands where thinpool.server.app does, so that supervisor, worker and data plane are tested by
themselves. Its "catalogue" is the table of served volumes.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from thinpool.engine import Change, ChangeKind
from thinpool.errors import HostSpaceError, ThinpoolError
from thinpool.model import VolumeId

if TYPE_CHECKING:
    from thinpool.server.context import WorkerContext


class Commands:
    def __init__(self, context: WorkerContext) -> None:
        self.context = context

    def _apply(self, change: Change) -> None:
        number = self.context.pool.status().transaction_id
        self.context.pool.apply([change], expected=number, new=number + 1)

    def create(self, id: int) -> None:  # noqa: A002
        self._apply(Change(kind=ChangeKind.CREATE, id=VolumeId(id)))

    def snapshot(self, id: int, origin: int) -> None:  # noqa: A002
        self._apply(Change(kind=ChangeKind.SNAPSHOT, id=VolumeId(id), origin=VolumeId(origin)))

    def delete(self, id: int) -> None:  # noqa: A002
        self._apply(Change(kind=ChangeKind.DELETE, id=VolumeId(id)))

    def add(self, id: int, **options: Any) -> str:  # noqa: A002
        return str(self.context.served.add(VolumeId(id), **options))

    def remove(self, id: int) -> None:  # noqa: A002
        self.context.served.remove(VolumeId(id))

    def resize(self, id: int, size: int) -> None:  # noqa: A002
        self.context.served.resize(VolumeId(id), size)

    def info(self) -> dict[str, Any]:
        status = self.context.pool.status()
        server = self.context.server
        return {
            "pid": os.getpid(),
            "served": [entry.id for entry in self.context.served.entries()],
            "used": status.data_blocks_used,
            "replayed": status.replayed,
            "mode": int(status.mode),
            "restarted": self.context.restarted,
            "statistics": {
                name: getattr(server.statistics(), name)
                for name in (server.statistics().__slots__ if server else ())
            },
        }

    def freeze(self, path: str, seconds: float) -> bool:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with self.context.link.frozen(fd) as still_frozen:
                time.sleep(seconds)
                return still_frozen()
        finally:
            os.close(fd)

    def fail(self) -> None:
        """From now on this program does not start."""
        (self.context.root / "fail").touch()


def answer(connection: socket.socket, commands: Commands, end: socket.socket) -> None:
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            command = json.loads(line)
            name = command.pop("op")
            if name == "end":
                end.close()
                break
            try:
                result = getattr(commands, name)(**command)
                reply = {"result": result}
            except ThinpoolError as error:
                reply = {"error": error.kind, "message": error.message}
            except OSError as error:
                reply = {"error": "os", "message": str(error), "errno": error.errno}
            connection.sendall(json.dumps(reply).encode() + b"\n")


def serve(context: WorkerContext) -> None:
    if (context.root / "fail").exists():
        raise HostSpaceError("the program fails because it was told to", path="fail")
    commands = Commands(context)
    done, end = socket.socketpair()
    context.listen.settimeout(0)
    context.link.serving()
    with context.listen, done:
        while True:
            ready, _, _ = select.select([context.listen, context.stopping, done], [], [])
            if ready != [context.listen]:
                return
            connection, _ = context.listen.accept()
            connection.settimeout(None)
            threading.Thread(target=answer, args=(connection, commands, end), daemon=True).start()
