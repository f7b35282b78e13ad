"""A graph driver for the tests of a module."""

from __future__ import annotations

import pytest

from tests.graphdriver.kit import a_driver


@pytest.fixture(scope="module")
def driver(require):
    require("root", "fuse", "loop", "ext4")
    with a_driver() as found:
        yield found
