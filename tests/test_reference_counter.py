"""What each process tells the node of its refs."""

import gc
import itertools
import pickle

import pytest

from minray import object_ref
from minray.object_ref import ObjectRef, new_ref, restore
from minray.reference_counter import ReferenceCounter, References

A, B = b"a" * 16, b"b" * 16


@pytest.fixture(params=[References, ReferenceCounter])
def counter(request, monkeypatch):
    gc.collect()  # What earlier tests have left in cycles is not for this counter.
    counter = request.param()
    monkeypatch.setattr(object_ref, "_born", counter.born)
    monkeypatch.setattr(object_ref, "_dropped", counter.dropped)
    return counter


def told(counter):
    """What would be sent now: (acquired, released)."""
    droppable = len(counter.dropped)
    acquired = counter.count_born()
    return acquired, counter.count_dropped(droppable)


def test_a_worker_tells_of_its_first_ref_and_of_its_last_only():
    counter = ReferenceCounter()
    counter.adopt(A)
    counter.born.extend([A, B, B])
    assert told(counter) == ([B], [])
    counter.dropped.extend([A, B])
    assert told(counter) == ([], [])
    counter.dropped.extend([A, B])
    assert told(counter) == ([], [A, B])


def test_the_driver_counts_each_ref_in_the_node_itself():
    counter = References()
    counter.adopt(A)
    counter.born.extend([A, A])
    counter.dropped.extend([A, A, A])
    assert told(counter) == ([A, A], [A, A, A])


def test_a_ref_that_dies_in_the_flush_that_tells_of_its_birth_is_told_in_this_order():
    counter = ReferenceCounter()
    counter.born.append(A)
    counter.dropped.append(A)
    assert told(counter) == ([A], [A])
    assert told(counter) == ([], [])


def test_what_is_dropped_while_messages_are_collected_is_told_with_the_next():
    counter = ReferenceCounter()
    counter.adopt(A)
    limit = len(counter.dropped)
    counter.dropped.append(A)
    assert counter.count_dropped(limit) == []
    assert told(counter) == ([], [A])


def test_a_worker_that_is_told_of_any_history_of_refs_never_releases_what_it_still_has():
    """Exhaustive: every order of births, drops and flushes, six steps deep."""
    for steps in itertools.product(["born", "drop", "flush"], repeat=6):
        counter = ReferenceCounter()
        counter.adopt(A)
        alive, held = 1, True  # refs that exist; whether the node thinks that there are any
        for step in (*steps, "flush"):
            if step == "born":
                counter.born.append(A)
                alive += 1
            elif step == "drop" and alive:
                counter.dropped.append(A)
                alive -= 1
            elif step == "flush":
                acquired, released = told(counter)
                held = held or bool(acquired)
                held = held and not released
                assert held == bool(alive), steps


def test_dropping_a_ref_is_counted_once_and_leaves_nothing(counter):
    ref = new_ref(A)
    counter.adopt(A)
    del ref
    assert told(counter)[1] == [A]
    gc.collect()
    assert told(counter) == ([], [])
    assert not counter.dropped


def test_what_is_released_on_a_wire_is_an_id_and_not_a_ref():
    counter = ReferenceCounter()
    counter.dropped.append(new_ref(A))
    assert [type(object_id) for object_id in told(counter)[1]] == [bytes]


def test_a_ref_made_from_an_id_by_hand_counts_like_any_other(counter):
    counter.adopt(A)
    original = new_ref(A)
    copies = [ObjectRef(A), ObjectRef(original.binary()), pickle.loads(pickle.dumps(original)), restore(A)]
    assert {type(copy) for copy in copies} == {ObjectRef} and copies == [original] * 4
    acquired = told(counter)[0]
    assert acquired in ([], [A] * 4)  # Of a worker's table: known. Of the node's: each.
    del copies[:]
    assert len(told(counter)[1]) == len(acquired)
    del original
    assert told(counter)[1] == [A]
