"""A server program for tests: one JSON command a line, one JSON answer a line.

It stands where thinpool.server.app does, so that supervisor, worker and data plane are tested by
themselves. Its "catalogue" is the table of served volumes.
"""

from __future__ import annotations

import asyncio
import json
import os
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


async def serve(context: WorkerContext) -> None:
    if (context.root / "fail").exists():
        raise HostSpaceError("the program fails because it was told to", path="fail")
    commands = Commands(context)
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            command = json.loads(line)
            name = command.pop("op")
            if name == "end":
                done.set()
                break
            try:
                result = await asyncio.to_thread(getattr(commands, name), **command)
                reply = {"result": result}
            except ThinpoolError as error:
                reply = {"error": error.kind, "message": error.message}
            except OSError as error:
                reply = {"error": "os", "message": str(error), "errno": error.errno}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()

    context.listen.settimeout(0)
    server = await asyncio.start_unix_server(answer, sock=context.listen)
    context.link.serving()
    waits = {asyncio.ensure_future(context.stopping.wait()), asyncio.ensure_future(done.wait())}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for each in waits:
        each.cancel()
    server.close()
