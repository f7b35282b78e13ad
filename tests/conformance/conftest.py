"""Every test of this folder that takes ``driver`` runs once for each engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.driver import DRIVERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conformance.driver import DmDriver, Driver


@pytest.fixture(params=["user", pytest.param("dm", marks=pytest.mark.dm)])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Driver]:
    """A pool's driver, of each engine."""
    found = DRIVERS[request.param](tmp_path)
    yield found
    found.finish()


@pytest.fixture
def dm(tmp_path: Path) -> Iterator[DmDriver]:
    """The kernel's, for what only it has; such tests are marked dm."""
    found = DRIVERS["dm"](tmp_path)
    yield found
    found.finish()
