"""Systemd units of ours: servers of pools, and bringing volumes back at boot.

``thinpool@POOL.service`` is one pool's server. ``thinpool-pools.service`` activates at boot what
was activated to persist. Both are for one root, which the template names, so that whoever starts a
server knows whether the unit is its.

A server without a unit detaches itself. With one it has a cgroup of its own, so that it does not
end with the session or the service that happened to need the pool first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Final

from thinpool.host.failures import failure

DIRECTORY: Final = "/etc/systemd/system"
POOLS_UNIT: Final = "thinpool-pools.service"
SERVER_UNIT: Final = "thinpool@.service"

_ROOT_KEY: Final = "X-ThinpoolRoot="
_RUNS: Final = "/run/systemd/system"
_SERVER: Final = """\
[Unit]
Description=thinpool: server of pool %i
Documentation=man:thinpool(8)
RequiresMountsFor="{root}"
{key}{root}

[Service]
Type=forking
ExecStart="{python}" -P -m thinpool.server.supervisor --detach --root "{root}" --pool %i
PIDFile={root}/pools/%i/supervisor.pid
KillMode=mixed
TimeoutStartSec=120
TimeoutStopSec=90
Restart=on-failure
OOMScoreAdjust=-900
TasksMax=infinity
"""
_POOLS: Final = """\
[Unit]
Description=thinpool: volumes that persist
Documentation=man:thinpool-resume(8)
RequiresMountsFor="{root}"
ConditionPathIsDirectory={root}/pools
After=local-fs.target systemd-udevd.service
Before=docker.service containerd.service libvirtd.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart="{python}" -P -m thinpool --root "{root}" --timeout 300 resume
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
"""


def texts(root: str) -> dict[str, str]:
    """The units for a root, by file name.

    Args:
        root: absolute.
    """
    escaped = root.replace("%", "%%")
    values = {"root": escaped, "python": sys.executable, "key": _ROOT_KEY}
    return {SERVER_UNIT: _SERVER.format(**values), POOLS_UNIT: _POOLS.format(**values)}


def install(root: str, *, directory: str = DIRECTORY) -> list[str]:
    """Write the units; returns their paths. They are enabled by systemctl, not here.

    Raises:
        NotPermittedError, NotFoundError, StorageIOError: the directory cannot be written.
    """
    written = []
    for name, text in texts(root).items():
        path = os.path.join(directory, name)
        try:
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                file.write(text)
            os.rename(f"{path}.new", path)
        except OSError as cause:
            raise failure(cause, f"cannot write {path}", path=path) from cause
        written.append(path)
    return written


def server_unit(root: str, pool: str, *, directory: str = DIRECTORY) -> str | None:
    """The unit that serves a pool; None where systemd does not run, or has none for this root."""
    if not os.path.isdir(_RUNS) or os.geteuid() != 0:
        return None
    try:
        with open(os.path.join(directory, SERVER_UNIT), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    escaped = root.replace("%", "%%")
    if f"{_ROOT_KEY}{escaped}" not in lines:
        return None
    return SERVER_UNIT.replace("@", f"@{pool}")


def start(unit: str, *, timeout: float) -> bool:
    """Have systemd start a unit; False where it did not, for whatever reason."""
    program = shutil.which("systemctl")
    if program is None:
        return False
    try:
        done = subprocess.run(
            [program, "--no-ask-password", "start", unit],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
