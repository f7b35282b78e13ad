"""File trees that change by seeded steps: as a model, and as a shell script that does the same.

The script runs wherever the filesystem is mounted, here or in a guest that sees our files, so both
sides make the same changes and neither tells the other what it found.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

KIB = 1 << 10
FILE_MAX = 1536 * KIB
MODES = (0o600, 0o640, 0o644, 0o755, 0o400, 0o4755, 0o2750)


@dataclass(frozen=True)
class Node:
    """One file ('f', its data), directory ('d') or symbolic link ('l', its target as data)."""

    kind: str
    mode: int
    data: bytes = b""


@dataclass
class Script:
    """Shell lines that change a mounted tree, and the files that they copy from."""

    payloads: Path
    lines: list[str] = field(default_factory=list)

    def payload(self, data: bytes) -> str:
        """The quoted path of a file with this content."""
        path = self.payloads / hashlib.sha256(data).hexdigest()[:24]
        if not path.exists():
            path.write_bytes(data)
        return shlex.quote(str(path))


@dataclass
class Tree:
    """What a filesystem should hold."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def copy(self) -> Tree:
        """As a snapshot is: nodes are never changed in place."""
        return Tree(dict(self.nodes))

    def files(self) -> list[str]:
        return sorted(path for path, node in self.nodes.items() if node.kind == "f")

    def folders(self) -> list[str]:
        return ["", *sorted(f"{p}/" for p, node in self.nodes.items() if node.kind == "d")]

    # ---- changing -----------------------------------------------------------------------------

    def change(self, random_: random.Random, script: Script, steps: int) -> None:
        """Make random changes, and say in the script how."""
        does = (self._create, self._create, self._overwrite, self._overwrite, self._truncate,
                self._append, self._remove, self._rename, self._chmod, self._link, self._sparse,
                self._folder)  # fmt: skip
        for _ in range(steps):
            random_.choice(does)(random_, script)

    def _new_path(self, random_: random.Random, suffix: str) -> str:
        return f"{random_.choice(self.folders())}{random_.getrandbits(40):010x}{suffix}"

    def _create(self, random_: random.Random, script: Script) -> None:
        length = random_.choice((0, 1, 777, 4096, 30_000, 65_536, 200_000, 700_000, FILE_MAX))
        node = Node("f", random_.choice(MODES), random_.randbytes(length))
        path = self._new_path(random_, ".bin")
        self.nodes[path] = node
        name = shlex.quote(path)
        script.lines.append(f"cp {script.payload(node.data)} {name}; chmod {node.mode:o} {name}")

    def _sparse(self, random_: random.Random, script: Script) -> None:
        offset = random_.randrange(FILE_MAX)
        tail = random_.randbytes(random_.randrange(1, 70_000))
        path = self._new_path(random_, ".sparse")
        self.nodes[path] = Node("f", 0o644, bytes(offset) + tail)
        self._write(path, offset, tail, script)
        script.lines.append(f"chmod 644 {shlex.quote(path)}")

    @staticmethod
    def _write(path: str, offset: int, data: bytes, script: Script) -> None:
        script.lines.append(
            f"dd if={script.payload(data)} of={shlex.quote(path)} bs=64K seek={offset} "
            "oflag=seek_bytes conv=notrunc status=none"
        )

    def _some(self, random_: random.Random) -> str | None:
        files = self.files()
        return random_.choice(files) if files else None

    def _overwrite(self, random_: random.Random, script: Script) -> None:
        path = self._some(random_)
        if path is None or not self.nodes[path].data:
            return
        node = self.nodes[path]
        offset = random_.randrange(len(node.data))
        data = random_.randbytes(min(random_.choice((1, 4096, 100_000)), len(node.data) - offset))
        whole = node.data[:offset] + data + node.data[offset + len(data) :]
        self.nodes[path] = replace(node, data=whole)
        self._write(path, offset, data, script)

    def _append(self, random_: random.Random, script: Script) -> None:
        path = self._some(random_)
        if path is None or len(self.nodes[path].data) > FILE_MAX:
            return
        node = self.nodes[path]
        data = random_.randbytes(random_.choice((1, 5000, 150_000)))
        self.nodes[path] = replace(node, data=node.data + data)
        self._write(path, len(node.data), data, script)

    def _truncate(self, random_: random.Random, script: Script) -> None:
        path = self._some(random_)
        if path is None:
            return
        node = self.nodes[path]
        length = random_.randrange(FILE_MAX)
        data = node.data[:length] + bytes(max(0, length - len(node.data)))
        self.nodes[path] = replace(node, data=data)
        script.lines.append(f"truncate -s {length} {shlex.quote(path)}")

    def _remove(self, random_: random.Random, script: Script) -> None:
        path = self._some(random_)
        if path is None:
            return
        del self.nodes[path]
        script.lines.append(f"rm -f {shlex.quote(path)}")

    def _rename(self, random_: random.Random, script: Script) -> None:
        path = self._some(random_)
        if path is None:
            return
        new = self._new_path(random_, ".moved")
        self.nodes[new] = self.nodes.pop(path)
        script.lines.append(f"mv {shlex.quote(path)} {shlex.quote(new)}")

    def _chmod(self, random_: random.Random, script: Script) -> None:
        path = self._some(random_)
        if path is None:
            return
        mode = random_.choice(MODES)
        self.nodes[path] = replace(self.nodes[path], mode=mode)
        script.lines.append(f"chmod {mode:o} {shlex.quote(path)}")

    def _link(self, random_: random.Random, script: Script) -> None:
        target = self._some(random_) or "nowhere"
        path = self._new_path(random_, ".link")
        self.nodes[path] = Node("l", 0o777, target.encode())
        script.lines.append(f"ln -s {shlex.quote(target)} {shlex.quote(path)}")

    def _folder(self, random_: random.Random, script: Script) -> None:
        if len(self.folders()) > 8:
            return
        path = self._new_path(random_, "")
        self.nodes[path] = Node("d", 0o750)
        script.lines.append(f"mkdir -m 750 {shlex.quote(path)}")

    # ---- telling and finding ------------------------------------------------------------------

    def sums(self) -> str:
        """For ``sha256sum --check``."""
        return "".join(
            f"{hashlib.sha256(self.nodes[path].data).hexdigest()}  ./{path}\n"
            for path in self.files()
        )

    def listing(self) -> str:
        """For a comparison with what find and stat print; see verify_tree in guest.sh."""
        return "".join(sorted(f"{line}\n" for line in self._lines()))

    def _lines(self) -> Iterator[str]:
        for path, node in self.nodes.items():
            if node.kind == "f":
                yield f"./{path} f {node.mode:o} {len(node.data)}"
            elif node.kind == "d":
                yield f"./{path} d {node.mode:o}"
            else:
                yield f"'./{path}' -> '{node.data.decode()}' l"

    def verify(self, root: Path) -> None:
        """Assert that a mounted filesystem holds this and nothing else."""
        found = read_tree(root)
        for path, node in self.nodes.items():
            assert path in found, f"{root}: {path} is gone"
            assert found[path] == node, f"{root}: {difference(found[path], node)} in {path}"
        extra = found.keys() - self.nodes.keys()
        assert not extra, f"{root}: {sorted(extra)} should not be there"


def difference(found: Node, wanted: Node) -> str:
    """Where two nodes differ, in words."""
    if found.kind != wanted.kind or found.mode != wanted.mode:
        return f"{found.kind} {found.mode:o} instead of {wanted.kind} {wanted.mode:o}"
    if len(found.data) != len(wanted.data):
        return f"{len(found.data)} bytes instead of {len(wanted.data)}"
    at = next(i for i, (a, b) in enumerate(zip(found.data, wanted.data, strict=True)) if a != b)
    return f"another byte at {at}"


def read_tree(root: Path) -> dict[str, Node]:
    """All that is below a directory, but ext4's lost+found."""
    found: dict[str, Node] = {}
    for folder, names, files in os.walk(root):
        if Path(folder) == root and "lost+found" in names:
            names.remove("lost+found")
        for name in [*names, *files]:
            path = Path(folder) / name
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            key = str(path.relative_to(root))
            if stat.S_ISLNK(status.st_mode):
                found[key] = Node("l", mode, str(path.readlink()).encode())
            elif stat.S_ISDIR(status.st_mode):
                found[key] = Node("d", mode)
            else:
                found[key] = Node("f", mode, path.read_bytes())
    return found
