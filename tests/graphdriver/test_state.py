"""Counts of Gets: who asks again because no answer came is counted once."""

from __future__ import annotations

import contextlib

import pytest

from thinpool.graphdriver import state as module
from thinpool.graphdriver.state import State


@pytest.fixture
def opened(tmp_path):
    """Opens the state, as each process of a driver does."""
    with contextlib.ExitStack() as stack:

        def fresh():
            stack.close()
            return stack.enter_context(contextlib.closing(State(tmp_path / "state.db")))

        yield fresh


def get(state, layer="one"):
    state.answered(state.add(layer))


def put(state, layer="one"):
    state.answered(state.take(layer))


def test_gets_and_puts_are_counted_and_kept(opened):
    state = opened()
    for _ in range(3):
        get(state)
    put(state)
    assert opened().counted() == {"one": 2}


def test_get_without_an_answer_that_comes_again_counts_once(opened):
    opened().add("one")
    state = opened()
    get(state)
    assert state.count("one") == 1
    get(state)
    assert state.count("one") == 2


def test_put_without_an_answer_that_comes_again_counts_once(opened):
    state = opened()
    for _ in range(3):
        get(state)
    state.take("one")
    state = opened()
    put(state)
    assert state.count("one") == 2
    put(state)
    assert state.count("one") == 1


def test_get_whose_client_went_away_counts_when_it_comes_again(opened):
    state = opened()
    get(state)
    state.lose(state.add("one"))
    assert state.count("one") == 2
    get(state)
    assert state.count("one") == 2


def test_one_lost_answer_excuses_one_call_only(opened):
    first = opened()
    first.add("one")
    first.add("one")
    state = opened()
    for wanted in (2, 2, 3):
        get(state)
        assert state.count("one") == wanted


def test_call_that_comes_after_dockerds_patience_is_another_one(opened, monkeypatch):
    opened().add("one")
    state = opened()
    state.expire()  # it may be on its way
    get(state)
    assert state.count("one") == 1
    state.add("one")
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    state = opened()
    state.expire()
    get(state)
    assert state.count("one") == 3


def test_after_an_init_one_hold_is_left(opened):
    state = opened()
    for _ in range(3):
        get(state)
    state.inherit()
    assert state.inherited() == {"one"}
    get(state)  # dockerd looks at the layer of a container that runs on
    put(state)
    assert state.inherited() == set()
    assert state.count("one") == 1
    put(state)
    assert state.counted() == {}


def test_after_an_init_no_answer_is_waited_for(opened):
    state = opened()
    state.lose(state.add("one"))
    state.inherit()
    get(state)
    assert state.count("one") == 2


def test_counts_of_another_boot_are_forgotten(opened):
    state = opened()
    get(state)
    state.inherit()
    state.keep("boot", "another")
    state = opened()
    assert state.counted() == {}
    assert state.inherited() == set()
