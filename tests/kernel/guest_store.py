"""Work on the pools under a root, asked line by line by a shell: guest_store.py ROOT.

One process for a whole session, since Python takes seconds to start in a guest. Answers are one
line each: ``ok``, with what was asked for, or ``failed`` and why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from thinpool import Thinpool
from thinpool.errors import ThinpoolError

if TYPE_CHECKING:
    from collections.abc import Callable


def expect(api: Thinpool, file: str) -> str:
    """The volumes are those that a file tells, by name and id, and nothing is wrong with them."""
    wanted = json.loads(Path(file).read_text())
    found = {volume.name: volume.id for volume in api.list("p")}
    if found != wanted:
        return f"failed: the store has {found}, and should have {wanted}"
    wrong = [f"{each.subject}: {each.message}" for each in api.doctor("p").pools["p"]
             if each.state == "wrong"]  # fmt: skip
    return f"failed: {'; '.join(wrong)}" if wrong else "ok"


def check(api: Thinpool) -> str:
    """The checker finds nothing but blocks that the kernel leaked."""
    bad = [fault for fault in api.check("p").faults
           if fault.severity == "fatal" or fault.structure != "data-space-map"]  # fmt: skip
    return f"failed: {bad}" if bad else "ok"


def commands(api: Thinpool) -> dict[str, Callable[..., object]]:
    """What can be asked; a returned string is the answer."""
    return {
        "activate": lambda name: f"ok {api.activate(f'p/{name}').device}",
        "check": lambda: check(api),
        "create": lambda name, size: api.create(f"p/{name}", size=int(size)),
        "deactivate": lambda name: api.deactivate(f"p/{name}"),
        "engine": lambda name: api.set("p", {"engine": name}),
        "expect": lambda file: expect(api, file),
        "remove": lambda name: api.remove([f"p/{name}"]),
        "snapshot": lambda source, name: api.snapshot(f"p/{source}", f"p/{name}"),
        "stop": lambda: api._session.client("p").stop_server(),
    }


def main() -> None:
    with Thinpool(sys.argv[1], timeout=120) as api:
        table = commands(api)
        for line in sys.stdin:
            verb, *words = line.split()
            try:
                answer = table[verb](*words)
            except ThinpoolError as error:
                answer = f"failed {type(error).__name__}: {error}"
            print(answer if isinstance(answer, str) else "ok", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
