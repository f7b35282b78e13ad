"""The long version of the kill test: 200 kills in CI, more in `make soak`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.fuse.soak_kill import soak

if TYPE_CHECKING:
    from pathlib import Path

# Fewer where someone works on something else; CI and `make test` kill as often as is promised.
KILLS = {"soak": 2000, "dev": 40}.get(os.environ.get("THINPOOL_PROFILE", "ci"), 200)


@pytest.mark.slow
@pytest.mark.timeout(7200 if KILLS > 200 else 900)
@pytest.mark.fuse
@pytest.mark.loop
def test_workers_killed_under_ext4_and_xfs(root: Path, seed: int, require: object) -> None:
    """INV-18, INV-20, INV-21, at scale."""
    require("fio", "ext4", "xfs")  # type: ignore[operator]
    outcome = soak(root, kills=KILLS, seed=seed, kinds=("ext4", "xfs"))
    assert not outcome.faults
    # The kills came while there was something to lose.
    assert outcome.files > KILLS // 10
    assert outcome.replayed
    assert outcome.taken_up
