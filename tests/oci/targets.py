"""A layer target of plain directories: a layer is a copy of the one below it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class DirectoryLayer:
    def __init__(self, target: DirectoryTarget, path: Path) -> None:
        self.target = target
        self.path = path
        self.root_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.ended = ""

    def _end(self, how: str) -> None:
        if not self.ended:
            os.close(self.root_fd)
        self.ended = how

    def seal(self, *, chain_id: str, diff_id: str) -> None:
        assert not self.ended
        self.target.calls.append(("seal", chain_id, diff_id))
        if self.target.seal_error is not None:
            raise self.target.seal_error
        self._end("sealed")
        self.path.rename(self.target.place(chain_id))

    def abort(self) -> None:
        assert self.ended != "sealed"
        self.target.calls.append(("abort",))
        self._end("aborted")
        subprocess.run(["/bin/rm", "-rf", self.path], check=True)


class DirectoryTarget:
    """Records what is asked of it in ``calls``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        self.calls: list[tuple] = []
        self.begun: list[DirectoryLayer] = []
        self.seal_error: Exception | None = None

    def place(self, chain_id: str) -> Path:
        return self.root / chain_id.replace(":", "-")

    def has(self, chain_id: str) -> bool:
        return self.place(chain_id).exists()

    def begin(self, parent: str | None, *, chain_id: str | None) -> DirectoryLayer:
        self.calls.append(("begin", parent, chain_id))
        path = self.root / f"work-{len(self.begun)}"
        if parent is None:
            path.mkdir()
        else:
            subprocess.run(["/bin/cp", "-a", self.place(parent), path], check=True)
        self.begun.append(DirectoryLayer(self, path))
        return self.begun[-1]

    def unfinished(self) -> list[str]:
        """What is left of layers that were neither sealed nor dropped."""
        return sorted(path.name for path in self.root.glob("work-*"))
