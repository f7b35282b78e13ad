"""Pools for the store's tests: real ones, opened in this process, without a server."""

import pytest

from tests.store.pools import make_pool, opened


@pytest.fixture(name="make_pool")
def make_pool_fixture():
    return make_pool


@pytest.fixture(name="opened")
def opened_fixture():
    return opened


@pytest.fixture
def root(tmp_path):
    make_pool(tmp_path)
    return tmp_path


@pytest.fixture
def service(root):
    with opened(root) as service:
        yield service


@pytest.fixture
def reopen(root):
    """Open the pool of the root, as often as wanted."""
    return lambda: opened(root)
