"""Everything that needs no mount works for an ordinary user, through a server of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import thinpool

SCRIPT = Path(__file__).parent / "unprivileged_script.py"
NOBODY = 65534


def as_nobody() -> list[str]:
    """A prefix that runs a command as nobody, who may read the interpreter wherever it lies."""
    return [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    ]


def test_pool_works_without_root_and_without_fuse(root, require):
    require("ext4")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(thinpool.__file__).parent.parent),
        "HOME": str(root),
    }
    environment.pop("THINPOOL_RUN", None)
    command = [sys.executable, "-W", "error", str(SCRIPT), str(root)]
    if os.geteuid() == 0:
        os.chown(root, NOBODY, NOBODY)
        command = [*as_nobody(), *command]
    done = subprocess.run(
        command,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd="/",
    )
    log = "".join(path.read_text() for path in root.glob("pools/*/server.log"))
    assert done.returncode == 0, done.stderr + log
    assert json.loads(done.stdout)["uid"] != 0
