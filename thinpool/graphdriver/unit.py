"""The unit file under which systemd runs a driver, with its place before Docker."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from thinpool.graphdriver.serve import Serving

_UNIT: Final = """\
[Unit]
Description=thinpool graph driver for Docker (pool {pool})
Before=docker.service
After=local-fs.target

[Service]
Type=notify
NotifyAccess=all
ExecStart={command}
Restart=always
RestartSec=1
# The pool's server runs on its own and serves the disks of running containers:
# stopping or replacing the driver must not take it along.
KillMode=process
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
RequiredBy=docker.service
"""


def unit(what: Serving, *, root: Path | None, default_socket: Path) -> str:
    """The unit's text.

    Args:
        what: is served.
        root: of the pools, where it is not the usual one.
        default_socket: where dockerd looks for a driver of this name.
    """
    words = [program()]
    if root is not None:
        words += ["--root", str(root)]
    words += ["serve", "graphdriver", what.pool, "--name", what.name]
    if what.socket != default_socket:
        words += ["--socket", str(what.socket)]
    return _UNIT.format(pool=what.pool, command=" ".join(_quoted(word) for word in words))


def program() -> str:
    """The path of the command that runs now, else of the one that is installed."""
    own = shutil.which(sys.argv[0]) if sys.argv[0].endswith("thinpool") else None
    return own or shutil.which("thinpool") or "/usr/local/bin/thinpool"


def _quoted(word: str) -> str:
    """As systemd.syntax(7) and systemd.service(5) want a word of ExecStart."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    escaped = escaped.replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or " " in word else word
