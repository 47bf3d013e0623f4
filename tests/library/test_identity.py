"""Which uid is a job's: nobody's that runs, and the one that has been free for longest."""

from __future__ import annotations

import pytest

from jobrunner.errors import LimitReached
from jobrunner.identity import Identities


def test_the_range_is_taken_in_a_circle() -> None:
    uids = Identities(100, 3, 100)
    assert [uids.take(), uids.take()] == [100, 101]
    uids.give_back(100)
    assert [uids.take(), uids.take()] == [102, 100]


def test_a_range_that_is_used_up_is_told() -> None:
    uids = Identities(100, 2, 100)
    uids.take()
    uids.take()
    with pytest.raises(LimitReached, match="all 2 uids are of running jobs"):
        uids.take()
    uids.give_back(101)
    assert uids.take() == 101


def test_one_that_was_found_running_is_nobody_elses() -> None:
    uids = Identities(100, 3, 102)
    uids.hold(100)
    assert [uids.take(), uids.take()] == [102, 101]


def test_one_that_is_held_twice_is_free_when_both_gave_it_back() -> None:
    uids = Identities(100, 1, 100)
    uids.hold(uids.take())
    uids.give_back(100)
    with pytest.raises(LimitReached):
        uids.take()
    uids.give_back(100)
    assert uids.take() == 100


def test_it_begins_anywhere_in_its_range() -> None:
    assert {Identities(100, 3).take() for _ in range(200)} == {100, 101, 102}


def test_a_uid_of_another_range_is_held_and_changes_nothing() -> None:
    uids = Identities(100, 2, 100)
    uids.hold(7)
    assert [uids.take(), uids.take()] == [100, 101]
