"""IDs tell who made what."""

from __future__ import annotations

import pytest

from minray import ids


def test_a_task_and_its_first_return_share_one_id() -> None:
    task_id = ids.pack_id(b"parent__", 7, 0)
    assert ids.return_id(task_id, 0) == task_id
    assert ids.task_of(ids.return_id(task_id, 3)) == task_id


def test_objects_that_a_task_put_do_not_meet_its_returns() -> None:
    task_id = ids.pack_id(b"parent__", 7, 0)
    assert ids.put_id(task_id, 1) != ids.return_id(task_id, 1)
    assert ids.is_put(ids.put_id(task_id, 1)) and not ids.is_put(ids.return_id(task_id, 1))
    assert ids.task_of(ids.put_id(task_id, 1)) == task_id


def test_the_children_of_a_task_are_numbered_under_one_prefix() -> None:
    root = ids.root_task_id(b"job")
    prefix = ids.children_prefix(root)
    child = ids.pack_id(prefix, 2**32 - 1, 0)
    assert len(child) == ids.ID_BYTES and child.startswith(prefix)
    assert ids.counter_of(child) == 2**32 - 1
    assert ids.children_prefix(child) != prefix
    assert ids.children_prefix(ids.return_id(child, 5)) == ids.children_prefix(child)


def test_the_same_job_name_gives_the_same_ids() -> None:
    assert ids.root_task_id(b"nightly") == ids.root_task_id(b"nightly") != ids.root_task_id(b"weekly")


def test_people_read_a_short_form_and_may_type_it_or_the_start_of_the_long_one() -> None:
    task_id = ids.pack_id(bytes.fromhex("9c1f000000000000"), 12, 0)
    assert ids.short(task_id) == "9c1f-12"
    assert ids.short(ids.return_id(task_id, 1)) == "9c1f-12.1"
    assert ids.short(ids.put_id(task_id, 3)) == "9c1f-12.p3"
    assert ids.matches(" 9C1F-12 ", task_id) and ids.matches(task_id.hex(), task_id) and ids.matches("9c1f00", task_id)
    assert not ids.matches("9c1f-1", task_id) and not ids.matches("9c", task_id) and not ids.matches("", task_id)


@pytest.mark.parametrize("counter", [-1, 2**32])
def test_a_counter_that_does_not_fit_is_refused(counter: int) -> None:
    with pytest.raises(Exception, match="format requires|argument out of range"):
        ids.pack_id(b"parent__", counter, 0)
