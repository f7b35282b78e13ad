"""Transaction ids, and two pools."""

from __future__ import annotations

import pytest

from tests.conformance.driver import pattern
from thinpool import errors
from thinpool.engine.backend import Change, ChangeKind
from thinpool.model import VolumeId


def creation(volume_id):
    return Change(kind=ChangeKind.CREATE, id=VolumeId(volume_id))


def test_a_new_pool_is_at_transaction_0(driver):
    driver.make()
    assert driver.pool.status().transaction_id == 0


def test_a_change_sets_it(driver):
    driver.make()
    driver.pool.apply([creation(0)], expected=0, new=7)
    assert driver.pool.status().transaction_id == 7
    driver.pool.apply([], expected=7, new=123_456_789_012)
    driver.reopen()
    assert driver.pool.status().transaction_id == 123_456_789_012


@pytest.mark.parametrize("wrong", [4, 6], ids=["one behind", "one ahead"])
def test_one_that_is_not_expected_is_refused_and_nothing_changes(driver, wrong):
    driver.make()
    driver.pool.apply([creation(0)], expected=0, new=5)
    with pytest.raises(errors.TransactionIdError) as caught:
        driver.pool.apply([creation(1)], expected=wrong, new=9)
    assert (caught.value.found, caught.value.wanted) == (5, wrong)
    assert driver.pool.status().transaction_id == 5
    assert driver.ids() == [0]


def test_a_volume_remembers_that_of_its_making(driver):
    driver.make()
    driver.pool.apply([creation(0)], expected=0, new=1)
    driver.pool.apply([creation(1)], expected=1, new=2)
    driver.reopen()
    assert [info.transaction_id for info in driver.pool.volumes()] == [0, 1]


def test_of_several_changes_one_that_fails_takes_the_others_with_it(driver):
    driver.make()
    driver.create(0)
    before = driver.pool.status().transaction_id
    with pytest.raises(errors.AlreadyExistsError):
        driver.apply(creation(5), creation(0))
    assert driver.pool.status().transaction_id == before
    assert driver.ids() == [0]


def test_two_pools_on_one_metadata_device_are_refused(driver):
    driver.make()
    driver.create(0)
    driver.put(0, 0, 1)
    with pytest.raises(errors.BusyError):
        driver.second_on_the_same_files()
    assert driver.holds(0, 0, 1)
    driver.put(0, 1, 2)


def test_two_pools_beside_each_other_know_nothing_of_each_other(driver, tmp_path):
    (tmp_path / "other").mkdir()
    other = type(driver)(tmp_path / "other")
    try:
        driver.make()
        other.make()
        for number, each in enumerate((driver, other)):
            each.create(0, 1)
            each.put(0, 0, number)
            each.snapshot(2, origin=0)
        other.delete(1)
        assert driver.ids() == [0, 1, 2]
        assert other.ids() == [0, 2]
        assert driver.volume(2).read(0, 8) == pattern(0)[:8]
        assert other.volume(2).read(0, 8) == pattern(1)[:8]
    finally:
        other.finish()
