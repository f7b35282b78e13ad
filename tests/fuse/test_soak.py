"""The long version of the kill test: longer still in `make soak`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.fuse.soak_kill import soak

if TYPE_CHECKING:
    from pathlib import Path

KILLS = 200 if os.environ.get("THINPOOL_PROFILE") == "soak" else 40


@pytest.mark.slow
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
