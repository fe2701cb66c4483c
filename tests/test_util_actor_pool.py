import itertools
import threading

import pytest
from test_util_executor import open_gate

import minray
from minray.util import ActorPool, as_completed, map_unordered

pytestmark = pytest.mark.usefixtures("module_session")


@minray.remote
class Worker:
    def double(self, x):
        return 2 * x

    def fail(self, x):
        raise ValueError(x)

    def wait_for(self, path, x=None):
        """Until somebody opens the other end."""
        open(path).close()
        return x


def doubled(actor, x):
    return actor.double.remote(x)


def pool_of(count):
    return ActorPool([Worker.remote() for _ in range(count)])


def test_map_returns_results_in_order_of_the_values():
    assert list(pool_of(2).map(doubled, range(20))) == [2 * x for x in range(20)]


def test_map_unordered_gives_first_what_is_ready_first(gate):
    pool = pool_of(2)
    found = pool.map_unordered(lambda a, x: a.wait_for.remote(gate, x) if x == 0 else a.double.remote(x), range(4))
    assert [next(found) for _ in range(3)] == [2, 4, 6]
    open_gate(gate)
    assert list(found) == [0]


def test_a_slow_call_keeps_no_other_actor_idle_while_results_are_awaited_in_order(gate, tmp_path):
    pool = pool_of(2)
    marks = [tmp_path / str(x) for x in range(5)]

    def work(actor, x):
        if x == 0:
            return actor.wait_for.remote(gate, x)
        return actor.__ray_call__.remote(lambda self, mark: mark.touch(), marks[x])

    for x in range(5):
        pool.submit(work, x)
    threading.Thread(target=open_when_all_are_there, args=(gate, marks[1:])).start()
    assert pool.get_next(timeout=60) == 0  # It is, only after the other actor has done the rest.


def open_when_all_are_there(gate, marks):
    pause = threading.Event()
    while not all(mark.exists() for mark in marks):
        pause.wait(0.01)
    open_gate(gate)


def test_an_actor_is_busy_until_its_result_has_been_seen():
    pool = pool_of(1)
    assert pool.has_free() and not pool.has_next()
    pool.submit(doubled, 1)
    assert not pool.has_free() and pool.has_next() and pool.pop_idle() is None
    assert pool.get_next() == 2
    assert pool.has_free() and not pool.has_next()


def test_actors_are_taken_out_and_put_in():
    first, second = Worker.remote(), Worker.remote()
    pool = ActorPool([first])
    with pytest.raises(ValueError, match="in the pool already"):
        pool.push(first)
    assert pool.pop_idle() == first
    pool.submit(doubled, 4)
    with pytest.raises(RuntimeError, match="no actors"):
        pool.get_next()
    pool.push(second)
    assert pool.get_next() == 8
    assert pool.pop_idle() == second and pool.pop_idle() is None


def test_a_result_that_is_late_is_a_timeout_and_comes_later(gate):
    pool = pool_of(1)
    pool.submit(lambda a, x: a.wait_for.remote(gate, x), 7)
    for get_next in (pool.get_next, pool.get_next_unordered):
        with pytest.raises(TimeoutError):
            get_next(timeout=0.01)
    open_gate(gate)
    assert pool.get_next() == 7


def test_a_late_result_that_is_ignored_is_dropped(gate):
    pool = pool_of(2)
    pool.submit(lambda a, x: a.wait_for.remote(gate, x), 7)
    pool.submit(doubled, 4)
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0.01, ignore_if_timedout=True)
    assert pool.get_next() == 8
    assert not pool.has_next()
    open_gate(gate)


def test_get_next_gives_the_oldest_that_was_not_given_out_unordered(gate):
    pool = pool_of(2)
    pool.submit(lambda a, x: a.wait_for.remote(gate, x), 1)
    pool.submit(doubled, 2)
    pool.submit(doubled, 3)
    assert pool.get_next_unordered() == 4
    open_gate(gate)
    assert [pool.get_next(), pool.get_next()] == [1, 6]
    with pytest.raises(StopIteration):
        pool.get_next()
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_an_error_is_raised_when_it_is_its_turn_and_frees_the_actor():
    pool = pool_of(1)
    pool.submit(lambda a, x: a.fail.remote(x), "no")
    pool.submit(doubled, 1)
    with pytest.raises(ValueError, match="no"):
        pool.get_next()
    assert pool.get_next() == 2


def test_a_function_that_returns_no_ref_is_refused_and_nothing_waits_for_it():
    pool = pool_of(1)
    with pytest.raises(TypeError, match="must return the ObjectRef"):
        pool.submit(lambda a, x: x, 1)
    assert not pool.has_next() and pool.has_free()


def test_map_drops_what_was_submitted_before_it():
    pool = pool_of(1)
    pool.submit(doubled, 100)
    pool.submit(doubled, 200)
    assert list(pool.map(doubled, [1, 2])) == [2, 4]


# ---------------------------------------------------------------- as_completed, map_unordered


@minray.remote
def gated(path, x):
    open(path).close()
    return x


@minray.remote
def square(x):
    return x * x


def test_as_completed_gives_values_or_refs_as_they_come(gate):
    late = gated.remote(gate, "late")
    rest = [square.remote(x) for x in range(3)]
    found = as_completed([late, *rest], chunk_size=2)
    assert sorted(next(found) for _ in range(3)) == [0, 1, 4]
    open_gate(gate)
    assert list(found) == ["late"]
    assert set(as_completed(rest, yield_obj_refs=True)) == set(rest)


def test_map_unordered_reads_endless_items_only_as_far_as_there_is_room():
    read = []
    items = (read.append(x) or x for x in itertools.count())
    found = map_unordered(square, items, backpressure_size=4, chunk_size=1)
    taken = [next(found) for _ in range(10)]
    assert len(read) <= 14 and set(taken) <= {x * x for x in read}
    assert sorted(map_unordered(square, range(5), backpressure_size=None)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"backpressure_size": -1}, {"chunk_size": 1.5}])
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="1 or more"):
        list(map_unordered(square, [1], **wrong))
